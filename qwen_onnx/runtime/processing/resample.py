"""Samples of a sound at another rate: a sinc under a Kaiser window, one filter for each place between two samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Samples = np.ndarray[Any, np.dtype[np.float32]]
# zero crossings of the sinc on each side, what remains of the lower rate's band, and the window's form: together
# 100 dB below the band within a tenth of it
CROSSINGS, PASSED, BETA = 64, 0.95, 10.06
# of outputs at once: their inputs are copied
PIECE = 1024


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
    places = np.arange(1 - reach, reach + 1)
    found = np.zeros(count, np.float32)
    for phase in range(min(up, count)):
        # outputs ``phase + up · j`` are all as far behind the input ``first + down · j``
        first, rest = divmod(phase * down, up)
        away = places - rest / up
        taps = np.sinc(scale * away) * np.i0(BETA * np.sqrt(np.maximum(0, 1 - (away / reach) ** 2)))
        taps /= taps.sum()
        inputs = windows[first::down][: -(-(count - phase) // up)]
        for begin in range(0, len(inputs), PIECE):
            piece = slice(begin, begin + PIECE)
            found[phase::up][piece] = inputs[piece] @ taps
    return found
