"""Engines: token ids in, token ids out."""

from typing import Literal

# engines read grammars' tokens from it, the text processing the rest
TOKENIZER_FILE = "tokenizer.json"
# how tokens are guessed, see ``batch.speculation``
Speculate = Literal["off", "ngram"]
# answers at once, and requests that may wait beyond them, where nobody says otherwise
STREAMS = 4
QUEUE_SIZE = 16
