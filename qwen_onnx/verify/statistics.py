"""Means with bounds, and the rule that turns them into a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwen_onnx.records import Verdict
from qwen_onnx.verify.records import Estimate
from qwen_onnx.verify.scoring import Positions
from qwen_onnx.verify.softmax import Floats

Counts = npt.NDArray[np.int64]

BOUND = 0.05  # one-sided: 5 % below the lower bound, 5 % above the upper
TAIL = 0.99


@dataclass(frozen=True)
class DriftEstimates:
    """Bounds over all domains, and the mean KLD of each."""

    kld_mean: Estimate
    kld_p99: Estimate
    top1: Estimate
    ppl_ratio: Estimate
    domains: dict[str, Estimate]


@dataclass(frozen=True)
class Blocks:
    """Neighbouring positions that are resampled together, because neighbours resemble each other.

    ``sums`` is [blocks, 4]: positions, KLD, agreements, difference of NLL;
    ``kld`` and ``owner`` are [positions]: the KLD and the block of each.
    """

    sums: Floats
    kld: Floats
    owner: Counts


def estimate(value: float, samples: Floats) -> Estimate:
    """``value`` with the bootstrap's 5 % and 95 % quantiles."""
    lower, upper = np.quantile(samples, [BOUND, 1 - BOUND])
    return Estimate(value=float(value), lower=float(lower), upper=float(upper))


def at_most(measured: Estimate, limit: float) -> Verdict:
    """PASS when the upper bound keeps the limit, FAIL when the lower bound breaks it. NaN fails."""
    if not np.isfinite([measured.value, measured.lower, measured.upper]).all():
        return Verdict.FAIL
    if measured.upper <= limit:
        return Verdict.PASS
    return Verdict.FAIL if measured.lower > limit else Verdict.INCONCLUSIVE


def at_least(measured: Estimate, limit: float) -> Verdict:
    """The mirror image of :func:`at_most`."""
    mirrored = Estimate(value=-measured.value, lower=-measured.upper, upper=-measured.lower)
    return at_most(mirrored, -limit)


def tail(kld: Floats, fraction: float = TAIL) -> float:
    """The smallest KLD that at least ``fraction`` of the positions do not exceed."""
    return float(np.quantile(kld, fraction, method="inverted_cdf"))


def blocks_of(parts: Sequence[Positions], size: int) -> Blocks:
    """Blocks of at most ``size`` neighbours; no block spans two windows."""
    sums, owners, count = [], [], 0
    for part in parts:
        columns = np.stack([np.ones_like(part.kld), part.kld, part.agree, part.nll_candidate - part.nll_baseline])
        starts = np.arange(0, len(part.kld), size)
        sums.append(np.add.reduceat(columns, starts, axis=1).T)
        owners.append(count + np.arange(len(part.kld)) // size)
        count += len(starts)
    return Blocks(np.concatenate(sums), np.concatenate([part.kld for part in parts]), np.concatenate(owners))


def _resampled_tails(kld: Floats, owner: Counts, drawn: Counts, chunk: int = 200) -> Floats:
    """The tail of each resample; ``drawn`` [resamples, blocks] says how often each block was drawn."""
    order = np.argsort(kld)
    ranked, owners = kld[order], owner[order]
    tails = []
    for start in range(0, len(drawn), chunk):
        below = np.cumsum(drawn[start : start + chunk, owners], axis=1)
        needed = np.ceil(TAIL * below[:, -1:])
        tails.append(ranked[(below < needed).sum(axis=1)])
    return np.concatenate(tails)


def bootstrap(domains: Mapping[str, Sequence[Positions]], *, block: int, resamples: int, seed: int) -> DriftEstimates:
    """Stratified block bootstrap: every resample draws each domain's blocks anew, with replacement.

    Args:
        domains: finite statistics of each window, by domain.
        block: positions per block.
    """
    random = np.random.default_rng(seed)
    strata = {name: blocks_of(parts, block) for name, parts in domains.items()}
    drawn = {
        name: random.multinomial(len(s.sums), np.full(len(s.sums), 1 / len(s.sums)), size=resamples)
        for name, s in strata.items()
    }
    totals = {name: drawn[name] @ s.sums for name, s in strata.items()}
    by_domain = {
        name: estimate(float(s.kld.mean()), totals[name][:, 1] / totals[name][:, 0]) for name, s in strata.items()
    }
    summed = np.sum(list(totals.values()), axis=0)
    means = summed[:, 1:] / summed[:, :1]
    observed = np.sum([s.sums.sum(axis=0) for s in strata.values()], axis=0)
    point = observed[1:] / observed[0]
    offsets = np.cumsum([0, *(len(s.sums) for s in strata.values())])[:-1]
    owner = np.concatenate([s.owner + start for s, start in zip(strata.values(), offsets, strict=True)])
    kld = np.concatenate([s.kld for s in strata.values()])
    return DriftEstimates(
        kld_mean=estimate(point[0], means[:, 0]),
        kld_p99=estimate(tail(kld), _resampled_tails(kld, owner, np.concatenate(list(drawn.values()), axis=1))),
        top1=estimate(point[1], means[:, 1]),
        ppl_ratio=estimate(float(np.exp(point[2])), np.exp(means[:, 2])),
        domains=by_domain,
    )


def median_ratio(
    numerator: Sequence[float], denominator: Sequence[float], *, seed: int, resamples: int = 2000
) -> Estimate:
    """Median of the paired ratios, found on their logarithms, with bootstrap bounds."""
    logs = np.log(np.asarray(numerator) / np.asarray(denominator))
    picks = np.random.default_rng(seed).integers(0, len(logs), size=(resamples, len(logs)))
    found = estimate(float(np.median(logs)), np.median(logs[picks], axis=1))
    return Estimate(
        value=float(np.exp(found.value)), lower=float(np.exp(found.lower)), upper=float(np.exp(found.upper))
    )
