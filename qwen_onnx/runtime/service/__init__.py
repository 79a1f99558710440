"""Prompts in, answers out: the Python interface."""
