"""Samples of a sound at another rate: a sinc under a Kaiser window, one filter for each place between two samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

Samples = np.ndarray[Any, np.dtype[np.float32]]
# zero crossings of the sinc on each side, what remains of the lower rate's band, and the window's form: together
# 100 dB below the band within a tenth of it
CROSSINGS, PASSED, BETA = 64, 0.95, 10.06
# of outputs at once, whose inputs are copied, and of filters that are made together
PIECE, FILTERS = 1024, 256


def resample(samples: Samples, rate: int, wanted: int) -> Samples:
    """``samples`` of ``rate`` a second at ``wanted`` a second, as many as fill the same time, rounded up."""
    if rate == wanted or not len(samples):
        return samples
    common = math.gcd(rate, wanted)
    up, down = wanted // common, rate // common
    count = -(-len(samples) * up // down)
    scale = PASSED * min(1.0, up / down)
    reach = math.ceil(CROSSINGS / scale)
    padded = np.pad(samples, (reach - 1, reach))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach)
    found = np.zeros(count, np.float32)
    for phase, (first, taps) in enumerate(_filters(min(up, count), up, down, reach, scale)):
        # outputs ``phase + up · j`` are all as far behind the input ``first + down · j``
        inputs = windows[first::down][: -(-(count - phase) // up)]
        for begin in range(0, len(inputs), PIECE):
            piece = slice(begin, begin + PIECE)
            found[phase::up][piece] = inputs[piece] @ taps
    return found


def _filters(
    count: int, up: int, down: int, reach: int, scale: float
) -> Iterator[tuple[int, np.ndarray[Any, np.dtype[np.float64]]]]:
    """Of each phase the first input behind which it is, and its filter [2 · reach]."""
    places = np.arange(1 - reach, reach + 1)
    # many at once: a Bessel function of a few hundred numbers is mostly the call
    for begin in range(0, count, FILTERS):
        first, rest = np.divmod(np.arange(begin, min(begin + FILTERS, count)) * down, up)
        away = places - rest[:, None] / up
        taps = np.sinc(scale * away) * np.i0(BETA * np.sqrt(np.maximum(0, 1 - (away / reach) ** 2)))
        yield from zip(first.tolist(), taps / taps.sum(1, keepdims=True), strict=True)
