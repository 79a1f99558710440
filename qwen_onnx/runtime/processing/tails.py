"""Marks that a stream of text may be in the middle of."""

from __future__ import annotations

from collections.abc import Iterable


def begun(text: str, marks: Iterable[str]) -> int:
    """Length of the longest tail of ``text`` that is the beginning, short of the whole, of one of ``marks``."""
    sizes = (size for mark in marks for size in range(1, len(mark)) if text.endswith(mark[:size]))
    return max(sizes, default=0)
