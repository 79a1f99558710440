"""Softmax of logits in float64, some positions at a time: each number is computed once, whoever reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Columns = Sequence[npt.NDArray[Any]]

# logits of a step: their float64 copies, of both sides about 4 MB, stay in a processor's cache
PIECE = 1 << 17
# sets of logits whose peaks bound the largest from below, for each of those: the bound then lets few others through
SETS = 4


class Softmax:
    """Probabilities of tokens at some positions.

    Attributes:
        logits: float32 [positions, vocabulary].
        shifted: float64, the logits less the largest of their position.
        weights: exponentials of ``shifted``.
        total: [positions], sums of the weights; ``log_total`` their logarithms.
    """

    def __init__(self, logits: Logits) -> None:
        self.logits = logits
        self.shifted = logits.astype(np.float64)
        self.shifted -= self.shifted.max(axis=-1, keepdims=True)
        self.weights = np.exp(self.shifted)
        self.total: Floats = self.weights.sum(axis=-1)
        self.log_total: Floats = np.log(self.total)

    @cached_property
    def first(self) -> Ids:
        """The likeliest token of each position."""
        found: Ids = self.logits.argmax(axis=-1)
        return found

    def logp(self, ids: npt.NDArray[Any]) -> Floats:
        """Log-probabilities in nats of ``ids`` [positions, any]."""
        found: Floats = np.take_along_axis(self.shifted, ids, axis=-1) - self.log_total[:, None]
        return found

    def log_rest(self, ids: npt.NDArray[Any]) -> Floats:
        """The logarithm of the mass beside ``ids``, summed where it is: 1 - sum(ids) would cancel."""
        held = np.take_along_axis(self.weights, ids, axis=-1)
        np.put_along_axis(self.weights, ids, 0.0, axis=-1)
        rest = self.weights.sum(axis=-1)
        np.put_along_axis(self.weights, ids, held, axis=-1)
        with np.errstate(divide="ignore"):
            found: Floats = np.log(rest / self.total)
        return found

    def largest(self, count: int) -> Ids:
        """The ``count`` likeliest tokens [positions, count], fewer than the vocabulary has, in falling order."""
        return np.stack([self._largest(row, count) for row in range(len(self.logits))])

    def _largest(self, row: int, count: int) -> Ids:
        # one more than asked for, so that a tie with the first one left out is seen
        found = at_least_largest(self.logits[row], count + 1)
        logp = self.shifted[row, found] - self.log_total[row]
        order = np.argsort(-logp, kind="stable")[: count + 1]
        ranked = logp[order]
        if len(ranked) > count and bool((ranked[1:] < ranked[:-1]).all()):
            top: Ids = found[order[:count]]
            return top
        # equal ones, which only the selection among all logits orders, or logits that are no numbers
        logp = self.shifted[row] - self.log_total[row]
        top = np.argpartition(-logp, count)[:count]
        return top[np.argsort(-logp[top], kind="stable")]


def at_least_largest(logits: Logits, count: int) -> Ids:
    """Places of the ``count`` largest of ``logits`` [vocabulary] in rising order, and of some others; NaN is left out.

    The peaks of disjoint sets are that many logits, so the least of the ``count`` highest peaks is a lower bound.
    """
    sets = SETS * count
    deep = len(logits) // sets
    peaks = logits if deep < 2 else logits[: deep * sets].reshape(deep, sets).max(axis=0)
    bound = np.partition(peaks, len(peaks) - count)[len(peaks) - count]
    return np.flatnonzero(logits >= bound)


def by_pieces(make: Callable[[slice], Columns], count: int, width: int, threads: int) -> list[npt.NDArray[Any]]:
    """Join the columns that ``make`` gives for ``count`` positions, some at a time.

    Args:
        width: of the vocabulary.
        threads: that make them; numpy lets go of the lock.
    """
    step = max(PIECE // width, 1)
    pieces = [slice(begin, min(begin + step, count)) for begin in range(0, count, step)]

    def quiet(rows: slice) -> Columns:
        # a logit that is no number gives NaN, which the verdict rejects; numpy's warning would only repeat it
        with np.errstate(all="ignore"):
            return make(rows)

    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(quiet, pieces) if len(pieces) > 1 < threads else map(quiet, pieces))
    return [np.concatenate(column) for column in zip(*parts, strict=True)]
