"""Recovery and flips: known answers, and what must stay undecided."""

from __future__ import annotations

import random

import pytest

from qwen_onnx.errors import VerificationError
from qwen_onnx.records import Verdict
from qwen_onnx.verify.records import Estimate, TaskResult
from qwen_onnx.verify.tasks.recovery import judged, mcnemar, recovered


def made(artifact: list[float], baseline: list[float], limit: float = 0.95) -> TaskResult:
    return judged("arc", "acc", "here", artifact, baseline, limit, resamples=2000, seed=1)


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    # scipy.stats.binomtest(min, sum).pvalue
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (0, 6, 0.03125), (8, 2, 0.109375), (15, 5, 0.04138946533203125)],
)
def test_mcnemar_is_the_exact_test(lost: int, won: int, p: float) -> None:
    assert mcnemar(lost, won) == pytest.approx(p)


def test_many_flips_are_no_overflow() -> None:
    assert mcnemar(3000, 3000) == 1.0
    assert 0 <= mcnemar(4000, 2000) < 1e-100


def test_the_same_answers_are_recovered_whole() -> None:
    right = [1.0, 0.0, 1.0, 1.0] * 25
    found = made(right, right)
    assert found.recovery is not None
    assert (found.recovery.value, found.recovery.lower, found.recovery.upper) == (1, 1, 1)
    assert (found.verdict, found.lost, found.won, found.p) == (Verdict.PASS, 0, 0, 1.0)
    assert found.artifact == found.baseline == 0.75


def test_half_of_the_accuracy_fails_and_a_little_of_it_on_few_items_is_undecided() -> None:
    baseline = [1.0] * 80 + [0.0] * 20
    assert made([1.0] * 40 + [0.0] * 60, baseline).verdict is Verdict.FAIL
    few = made([1.0] * 77 + [0.0] * 23, baseline)
    assert few.recovery is not None
    assert few.recovery.lower < 0.95 < few.recovery.upper
    assert few.verdict is Verdict.INCONCLUSIVE
    assert made([1.0] * 7700 + [0.0] * 2300, baseline * 100).verdict is Verdict.PASS


def test_pairs_are_kept() -> None:
    """The same accuracies with more flips say less."""
    calm, wild = (recovered(*kinds, resamples=4000, seed=0) for kinds in ((50, 0, 0, 50), (30, 20, 20, 30)))
    assert calm == Estimate(value=1, lower=1, upper=1)
    assert wild is not None
    assert wild.upper - wild.lower > 0.2


def test_bounds_hold_the_truth_as_often_as_they_say() -> None:
    rng, held = random.Random(7), 0
    for seed in range(200):
        kinds = rng.choices(range(4), weights=[50, 10, 5, 35], k=200)
        found = recovered(*(kinds.count(kind) for kind in range(4)), resamples=500, seed=seed)
        assert found is not None
        held += found.lower <= 55 / 60
    assert 0.9 <= held / 200 <= 0.99, "a one-sided bound of 95 %"


@pytest.mark.parametrize("right", [0, 1, 2])
def test_too_little_to_divide_by_is_undecided(right: int) -> None:
    baseline = [1.0] * right + [0.0] * (100 - right)
    found = made([1.0] * 100, baseline)
    assert (found.recovery, found.verdict) == (None, Verdict.INCONCLUSIVE)


@pytest.mark.parametrize(
    ("artifact", "baseline"), [([], []), ([1.0], [1.0, 0.0]), ([0.5], [1.0]), ([1.0], [float("nan")])]
)
def test_what_is_no_answer_is_an_error(artifact: list[float], baseline: list[float]) -> None:
    with pytest.raises(VerificationError, match=r"arc|acc"):
        made(artifact, baseline)
