"""Statistics by pieces and threads are those of the plain formula over all positions at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qwen_onnx.verify.golden import TOP, Kept, compare_and_keep, compare_coarse, kept
from qwen_onnx.verify.scoring import Positions, compare
from qwen_onnx.verify.softmax import PIECE, Softmax, at_least_largest

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(7)
TOKENS, VOCABULARY = 24, 12_289
LOGITS = (3 * RANDOM.standard_normal((TOKENS, VOCABULARY))).astype(np.float32)
NOISY = LOGITS + (0.3 * RANDOM.standard_normal(LOGITS.shape)).astype(np.float32)
IDS = RANDOM.integers(0, VOCABULARY, TOKENS).tolist()


def in_sixteen_bits(logits: Array) -> Array:
    return (logits.view(np.uint32) & 0xFFFF0000).view(np.float32)


def certain(logits: Array) -> Array:
    found = np.full_like(logits, -4000)
    found[:, 3] = 0
    return found


# name → what is done to the logits; from most to all of the kept tokens have equals but in the first
KINDS: dict[str, Callable[[Array], Array]] = {
    "distinct": lambda logits: logits,
    "rounded": lambda logits: logits.round(1),
    "sixteen bits": in_sixteen_bits,
    "ties at the edge": lambda logits: np.minimum(logits, np.sort(logits, axis=-1)[:, -TOP - 2, None]),
    "all equal": np.zeros_like,
    "certain": certain,
    # distinct in float32, equal once the largest is taken away
    "merged by the shift": lambda logits: np.where(logits < 3, logits, logits * np.float32(1e-25)),
}


def log_softmax(logits: Array) -> Array:
    found = logits.astype(np.float64)
    found -= found.max(axis=-1, keepdims=True)
    found -= np.log(np.exp(found).sum(axis=-1, keepdims=True))
    return found


def plain_kept(logits: Array, ids: list[int]) -> Kept:
    logp = log_softmax(logits[:-1])
    top = np.argpartition(-logp, TOP, axis=-1)[:, :TOP]
    order = np.argsort(-np.take_along_axis(logp, top, axis=-1), axis=-1, kind="stable")
    top = np.take_along_axis(top, order, axis=-1)
    return Kept(
        np.asarray(ids, np.int32),
        top.astype(np.int32),
        np.take_along_axis(logp, top, -1).astype(np.float32),
        np.maximum(plain_rest(logp, top), -1e4).astype(np.float32),
        logp[np.arange(len(logp)), ids[1:]].astype(np.float32),
    )


def plain_rest(logp: Array, top: Array) -> Array:
    others = np.exp(logp)
    np.put_along_axis(others, top, 0.0, axis=-1)
    with np.errstate(divide="ignore"):
        found: Array = np.log(others.sum(axis=-1))
    return found


def plain_compare(baseline: Array, candidate: Array, ids: list[int]) -> Positions:
    p, q = log_softmax(baseline[:-1]), log_softmax(candidate[:-1])
    rows = np.arange(len(p))
    diff = np.abs(baseline[:-1].astype(np.float64) - candidate[:-1]).max(-1)
    agree = (baseline[:-1].argmax(-1) == candidate[:-1].argmax(-1)).astype(np.float64)
    return Positions((np.exp(p) * (p - q)).sum(-1), agree, -p[rows, ids[1:]], -q[rows, ids[1:]], diff)


def plain_coarse(teacher: Kept, candidate: Array) -> Positions:
    logp = log_softmax(candidate[:-1])
    top, rows = teacher.top_ids, np.arange(len(logp))
    p, p_rest = teacher.top_logp.astype(np.float64), teacher.rest_logp.astype(np.float64)
    q, q_rest = np.take_along_axis(logp, top, -1), plain_rest(logp, top)
    with np.errstate(invalid="ignore"):
        rest = np.where(np.exp(p_rest) > 0, np.exp(p_rest) * (p_rest - q_rest), 0.0)
    agree = (candidate[:-1].argmax(-1) == top[:, 0]).astype(np.float64)
    nll = -logp[rows, teacher.ids[1:]]
    kld = (np.exp(p) * (p - q)).sum(-1) + rest
    return Positions(kld, agree, -teacher.next_logp.astype(np.float64), nll, np.abs(p - q).max(-1))


def require_near(found: Positions, wanted: Positions) -> None:
    for name in vars(wanted):
        # a divergence is a difference of sums of the size of a log-probability: that is what its error is relative to
        assert np.allclose(getattr(found, name), getattr(wanted, name), rtol=1e-12, atol=1e-13), name


def require_equal(found: Kept, wanted: Kept) -> None:
    for name in vars(wanted):
        assert getattr(found, name).dtype == getattr(wanted, name).dtype
        assert np.array_equal(getattr(found, name), getattr(wanted, name)), name


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_every_statistic_is_that_of_the_plain_formula(kind: str, threads: int) -> None:
    assert PIECE // VOCABULARY < TOKENS // 2, "more than one piece"
    baseline = KINDS[kind](LOGITS)
    part = plain_kept(baseline, IDS)
    require_near(compare(baseline, NOISY, IDS, threads), plain_compare(baseline, NOISY, IDS))
    require_equal(kept(baseline, IDS, threads), part)
    require_near(compare_coarse(part, NOISY, threads), plain_coarse(part, NOISY))
    full, own, coarse = compare_and_keep(baseline, NOISY, IDS, threads)
    require_near(full, plain_compare(baseline, NOISY, IDS))
    require_equal(own, part)
    require_near(coarse, plain_coarse(part, NOISY))


def test_a_candidate_with_columns_of_padding() -> None:
    padded = np.concatenate([NOISY, np.zeros((TOKENS, 7), np.float32)], axis=1)
    full, own, coarse = compare_and_keep(LOGITS, padded, IDS, 2)
    require_near(full, plain_compare(LOGITS, NOISY, IDS))
    require_equal(own, plain_kept(LOGITS, IDS))
    require_near(coarse, plain_coarse(own, padded))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_no_number_is_seen_by_every_way(bad: float, side: int) -> None:
    sides = [LOGITS.copy(), NOISY.copy()]
    sides[side][5, 11] = bad
    full, _, _ = compare_and_keep(*sides, IDS, 2)
    assert not full.finite
    assert not compare(*sides, IDS, 2).finite


@pytest.mark.parametrize("vocabulary", [4, 193, 194, 1543, 1544, 1545, VOCABULARY])
def test_the_bound_lets_all_of_the_largest_through(vocabulary: int) -> None:
    count = min(TOP + 1, vocabulary)
    for row in LOGITS[:, :vocabulary]:
        found = at_least_largest(row, count)
        assert set(np.argsort(row)[-count:]) <= set(found)


def test_the_mass_beside_some_leaves_the_weights_as_they_were() -> None:
    found = Softmax(LOGITS[:2])
    before = found.weights.copy()
    found.log_rest(np.array([[1, 2], [3, 4]]))
    assert np.array_equal(found.weights, before)
