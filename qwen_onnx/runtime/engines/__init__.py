"""Engines: token ids in, token ids out."""

from typing import Literal

# engines read grammars' tokens from it, the text processing the rest
TOKENIZER_FILE = "tokenizer.json"
# how tokens are guessed, see ``batch.speculation``
Speculate = Literal["off", "ngram", "auto"]
# what keys and values are kept in: the graph's own type, or see ``batch.int8_cache``
KvCache = Literal["float", "int8"]
# answers at once, and requests that may wait beyond them, where nobody says otherwise
STREAMS = 4
QUEUE_SIZE = 16
