"""Engines: token ids in, token ids out."""

# engines read grammars' tokens from it, the text processing the rest
TOKENIZER_FILE = "tokenizer.json"
# answers at once, and requests that may wait beyond them, where nobody says otherwise
STREAMS = 4
QUEUE_SIZE = 16
