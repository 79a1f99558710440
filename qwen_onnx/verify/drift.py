"""Teacher-forced drift: the artifact and PyTorch read the same tokens, position by position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from qwen_onnx.catalog.schema import Limits
from qwen_onnx.processes.progress import progress
from qwen_onnx.records import Verdict
from qwen_onnx.verify.corpus import Document, Window, take
from qwen_onnx.verify.golden import Kept, compare_and_keep
from qwen_onnx.verify.records import DomainDrift, Drift, VerifyOptions, worst
from qwen_onnx.verify.scoring import Positions, compare
from qwen_onnx.verify.softmax import Logits
from qwen_onnx.verify.statistics import DriftEstimates, at_least, at_most, bootstrap, tail

PLOT_POINTS = 200
# of all domains together in a golden file, about 1 kB each
MOST_POSITIONS = 6_200


class Scorer(Protocol):
    """Anything that gives logits [tokens, vocabulary] for token ids."""

    def logits(self, ids: Sequence[int]) -> Logits: ...


@runtime_checkable
class Prepared(Scorer, Protocol):
    """One that reads weights by and by, and therefore wants to know all texts first."""

    def prepare(self, texts: Sequence[Sequence[int]]) -> None: ...


@dataclass
class Collected:
    """Answers of the teacher for a golden file, of up to ``most`` positions of each domain.

    ``coarse`` and ``full`` are sums of the KLD on its outcomes and on all.
    """

    most: int
    windows: list[Window] = field(default_factory=list)
    parts: list[Kept] = field(default_factory=list)
    coarse: float = 0.0
    full: float = 0.0
    positions: int = 0
    vocabulary: int = 0

    def has_room(self, window: Window) -> bool:
        """Whether the window's domain has fewer positions than are kept."""
        held = sum(len(each.ids) for each in self.windows if each.domain == window.domain)
        return held + len(window.ids) <= self.most

    def compare(self, window: Window, baseline: Logits, candidate: Logits, threads: int) -> Positions:
        """See ``scoring.compare``; a window that has room and whose logits are numbers is kept."""
        if not self.has_room(window):
            return compare(baseline, candidate, window.ids, threads)
        found, part, coarse = compare_and_keep(baseline, candidate, window.ids, threads)
        if found.finite:
            self.windows.append(window)
            self.parts.append(part)
            self.coarse += float(coarse.kld.sum())
            self.full += float(found.kld.sum())
            self.positions += len(found.kld)
            self.vocabulary = baseline.shape[-1]
        return found


class DriftStudy:
    """Collects statistics window by window; logits are dropped as soon as they are compared.

    Args:
        baseline: PyTorch fp32.
        artifact: gives the quantised model, which is held only while texts are measured.
        reference: opens an fp32 export, which is compared on the first window of each domain.
        pools: all windows of each domain in the order of use.
        golden: whether answers are collected for a golden file.
    """

    def __init__(
        self,
        baseline: Scorer,
        artifact: Callable[[], Scorer],
        reference: Callable[[], Scorer] | None,
        pools: Mapping[str, Sequence[Window]],
        options: VerifyOptions,
        golden: bool = False,
    ) -> None:
        self.pools = {name: pool for name, pool in pools.items() if pool}
        self.parts: dict[str, list[Positions]] = {name: [] for name in self.pools}
        self.reference_parts: list[Positions] = []
        self.used: list[Window] = []
        self.golden = Collected(MOST_POSITIONS // max(len(self.pools), 1)) if golden else None
        self.doubled = False
        self._baseline, self._artifact, self._reference, self._options = baseline, artifact, reference, options

    def start(self) -> None:
        """First sample, together with the reference export, which is then released."""
        reference = self._reference() if self._reference else None
        self._measure(0, self._options.windows_per_domain, reference)

    def double(self) -> None:
        """As many windows again, where the texts hold them."""
        self._measure(self._options.windows_per_domain, 2 * self._options.windows_per_domain, None)
        self.doubled = True

    def _measure(self, start: int, stop: int, reference: Scorer | None) -> None:
        texts = [window.ids for pool in self.pools.values() for window in take(pool, start, stop)]
        artifact = self._artifact()
        for scorer in (self._baseline, artifact):
            if isinstance(scorer, Prepared):
                scorer.prepare(texts)
        for name, pool in self.pools.items():
            chosen = take(pool, start, stop)
            progress(f"drift: {len(chosen)} windows of {name}")
            for index, window in enumerate(chosen):
                self.parts[name].append(self._compared(window, artifact, reference if index == 0 else None))
                self.used.append(window)

    def _compared(self, window: Window, artifact: Scorer, reference: Scorer | None) -> Positions:
        """Statistics of one window; its logits are gone before the next one's are made."""
        threads = self._options.threads
        baseline, candidate = self._baseline.logits(window.ids), artifact.logits(window.ids)
        if reference:
            self.reference_parts.append(compare(baseline, reference.logits(window.ids), window.ids, threads))
        if self.golden:
            return self.golden.compare(window, baseline, candidate, threads)
        return compare(baseline, candidate, window.ids, threads)

    @property
    def finite(self) -> bool:
        """False when the artifact or the baseline gave a logit that is not a number."""
        return all(part.finite for parts in self.parts.values() for part in parts)

    def estimates(self) -> DriftEstimates:
        """Bounds of everything collected so far; only for finite statistics."""
        options = self._options
        return bootstrap(self.parts, block=options.block, resamples=options.resamples, seed=options.seed)

    def summary(self, found: DriftEstimates, documents: Mapping[str, Sequence[Document]]) -> Drift:
        """The record for the report."""
        everything = Positions.join([part for parts in self.parts.values() for part in parts])
        steps = np.linspace(0.0, 1.0, PLOT_POINTS + 1)
        used = {window.source for window in self.used}
        return Drift(
            positions=len(everything.kld),
            windows=len(self.used),
            doubled=self.doubled,
            kld_mean=found.kld_mean,
            kld_p99=found.kld_p99,
            top1=found.top1,
            ppl_ratio=found.ppl_ratio,
            baseline_ppl=float(np.exp(everything.nll_baseline.mean())),
            domains=tuple(_domain(name, parts, found) for name, parts in self.parts.items()),
            quantiles=tuple(zip(steps.tolist(), np.quantile(everything.kld, steps).tolist(), strict=True)),
            sources={doc.source: doc.sha256 for docs in documents.values() for doc in docs if doc.source in used},
        )


def _domain(name: str, parts: Sequence[Positions], found: DriftEstimates) -> DomainDrift:
    joined = Positions.join(parts)
    return DomainDrift(
        name=name,
        tokens=len(joined.kld),
        kld_mean=found.domains[name],
        kld_p99=tail(joined.kld),
        top1=float(joined.agree.mean()),
        ppl_ratio=float(np.exp((joined.nll_candidate - joined.nll_baseline).mean())),
    )


def judge(found: DriftEstimates, limits: Limits) -> dict[str, Verdict]:
    """One verdict per limit; the worst domain is judged by its own mean KLD."""
    allowed = limits.domain_factor * limits.kld_mean
    return {
        "kld_mean": at_most(found.kld_mean, limits.kld_mean),
        "kld_p99": at_most(found.kld_p99, limits.kld_p99),
        "top1": at_least(found.top1, limits.top1),
        "ppl_ratio": at_most(found.ppl_ratio, limits.ppl_ratio),
        "worst_domain": worst(at_most(domain, allowed) for domain in found.domains.values()),
    }
