"""The pass that gives an artifact its head for multi-token prediction, which guesses tokens."""
