"""Bounds of a share of right answers."""

from __future__ import annotations

import math


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % bounds of ``right`` out of ``asked`` (Wilson 1927)."""
    z, share = 1.959964, right / asked
    middle = share + z * z / (2 * asked)
    width = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return (middle - width) / (1 + z * z / asked), (middle + width) / (1 + z * z / asked)
