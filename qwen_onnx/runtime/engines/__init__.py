"""Engines: token ids in, token ids out."""

from typing import Literal

# engines read grammars' tokens from it, the text processing the rest
TOKENIZER_FILE = "tokenizer.json"
# answers at once, and requests that may wait beyond them, where nobody says otherwise
STREAMS = 4
QUEUE_SIZE = 16
# whether tokens are guessed where a text repeats itself
Speculate = Literal["off", "ngram"]
