"""Engines: token ids in, token ids out."""

# engines read grammars' tokens from it, the text processing the rest
TOKENIZER_FILE = "tokenizer.json"
