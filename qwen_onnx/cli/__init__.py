"""The command line: a verb is a function."""
