"""Grammars over token ids, by llguidance: https://github.com/guidance-ai/llguidance"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.engines import TOKENIZER_FILE
from qwen_onnx.runtime.engines.genai import Shape


class Grammars:
    """Makes matchers for the vocabulary of an artifact."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self._path, self._shape = folder / TOKENIZER_FILE, shape
        self._tokenizer: LLTokenizer | None = None

    def matcher(self, grammar: str) -> Matcher:
        """At the start of ``grammar``; RequestError when llguidance refuses it."""
        # built with the first grammar: it takes a second for a vocabulary of 150,000
        if self._tokenizer is None:
            eos = sorted(self._shape.eos_token_ids)
            self._tokenizer = LLTokenizer(str(self._path), n_vocab=self._shape.vocab_size, eos_token=eos)
        found = LLMatcher(self._tokenizer, grammar, log_level=0)
        if found.is_error():
            raise RequestError(f"the grammar is refused: {found.get_error()}", where="grammar")
        return Matcher(found)


class Matcher:
    """Where an answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self, vocab_size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which tokens may come next, bool [vocab_size]; EOS is among them where the answer may end."""
        words = np.zeros((vocab_size + 31) // 32, np.int32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()
        return np.unpackbits(words.view(np.uint8), bitorder="little")[:vocab_size].astype(bool)

    def consume(self, token: int) -> None:
        """Go on by one token."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            # the words go on with the parser's whole state
            words = self._matcher.get_error().splitlines()[0]
            raise RequestError(f"the grammar is more than llguidance can follow: {words}", where="grammar")
