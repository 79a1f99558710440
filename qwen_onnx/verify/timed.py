"""An engine whose tokens are timed in its own process, so that no pipe is part of the measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

Generate = Callable[[Sequence[int], int], Iterator[int]]


class Timed:
    """Greedy generation, timed.

    Args:
        generate: gives the tokens after a prompt, as many as asked for, each when it is drawn.
    """

    computed = ""
    """How seconds and memory were computed, where they were not measured."""

    def __init__(self, generate: Generate) -> None:
        self._generate = generate
        self._tokens: Iterator[int] = iter(())

    def prefill(self, ids: Sequence[int], new_tokens: int) -> float:
        """Seconds up to the first of ``new_tokens`` tokens after ``ids``."""
        # the old run must give back its memory and threads before the new one is timed
        self._tokens = iter(())
        self._tokens = self._generate(ids, new_tokens)
        return self.decode(1)

    def decode(self, count: int) -> float:
        """Seconds for the next ``count`` tokens.

        Raises:
            RuntimeError: the engine ended early; a speed from fewer tokens would be wrong.
        """
        started = time.perf_counter()
        drawn = len(list(islice(self._tokens, count)))
        seconds = time.perf_counter() - started
        if drawn != count:
            raise RuntimeError(f"{drawn} tokens instead of {count}")
        return seconds

    def peak_memory(self, measured: int) -> int:
        """Bytes that the whole engine takes, ``measured`` being the peak of this process."""
        return measured
