"""What an artifact keeps of PyTorch's accuracy, from the items that each of them answers rightly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen_onnx.errors import VerificationError
from qwen_onnx.records import Verdict
from qwen_onnx.verify.records import Estimate, TaskResult
from qwen_onnx.verify.statistics import at_least, estimate


def mcnemar(lost: int, won: int) -> float:
    """Two-sided p of the exact test: whether flips go one way more often than a fair coin would let them."""
    flips = lost + won
    # ways in which so few of the flips go one way; each count from the one before it
    ways = tail = 1
    for count in range(min(lost, won)):
        ways = ways * (flips - count) // (count + 1)
        tail += ways
    return min(1.0, float(2 * tail / 2**flips))


def recovered(both: int, lost: int, won: int, neither: int, *, resamples: int, seed: int) -> Estimate | None:
    """The ratio of accuracies, with bounds by a bootstrap over items, which keeps the pairs.

    An item is one of four kinds, so that drawing items anew is drawing their kinds.

    Returns:
        None: in some resample PyTorch answers nothing rightly.
    """
    counts = np.array([both, lost, won, neither])
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=resamples)
    baseline = drawn[:, 0] + drawn[:, 1]
    if not baseline.all() or both + lost == 0:
        return None
    return estimate((both + won) / (both + lost), (drawn[:, 0] + drawn[:, 2]) / baseline)


def judged(
    name: str,
    metric: str,
    source: str,
    artifact: Sequence[float],
    baseline: Sequence[float],
    limit: float,
    *,
    resamples: int,
    seed: int,
) -> TaskResult:
    """Judge one benchmark.

    Args:
        artifact, baseline: 1 for each item that is answered rightly, else 0, in the same order.
        limit: least recovery, which the lower bound must keep.

    Raises:
        VerificationError: there are no items, not the same on both sides, or their scores are not right or wrong.
    """
    if len(artifact) != len(baseline) or not artifact:
        raise VerificationError(f"{len(artifact)} and {len(baseline)} items were answered", where=name)
    if not {*artifact, *baseline} <= {0.0, 1.0}:
        raise VerificationError(f"{metric} is not right or wrong for each item", where=name)
    pairs = list(zip(map(bool, baseline), map(bool, artifact), strict=True))
    both, lost, won, neither = (
        pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))
    )
    found = recovered(both, lost, won, neither, resamples=resamples, seed=seed)
    return TaskResult(
        name=name,
        metric=metric,
        source=source,
        items=len(pairs),
        artifact=(both + won) / len(pairs),
        baseline=(both + lost) / len(pairs),
        recovery=found,
        lost=lost,
        won=won,
        p=mcnemar(lost, won),
        verdict=at_least(found, limit) if found else Verdict.INCONCLUSIVE,
    )
