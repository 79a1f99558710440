"""What checks have in common, whoever the teacher is: a checkpoint, or the answers that were kept of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qwen_onnx.catalog.schema import Limits
from qwen_onnx.errors import QwenOnnxError
from qwen_onnx.processes.progress import progress
from qwen_onnx.records import Verdict
from qwen_onnx.runtime.engines.batch.layout import UnsupportedGraphError
from qwen_onnx.verify.drift import Scorer, judge
from qwen_onnx.verify.parity import Mismatch, batched_logits, decode_positions
from qwen_onnx.verify.records import CheckResult, Estimate, worst
from qwen_onnx.verify.scoring import Positions
from qwen_onnx.verify.statistics import DriftEstimates, at_least, at_most

# Kernels that quantise activations (accuracy level 4) compute otherwise for one token than for many. Both
# paths lie equally near PyTorch; between them lies about a tenth of the drift allowed (docs/lab-log.md).
DECODE_KLD = 2e-2
DECODE_TOP1 = 0.85
DECODE_LIMIT: dict[str, float | str] = {"kld_mean": DECODE_KLD, "top1": DECODE_TOP1}


def carried_out(name: str, make: Callable[[], CheckResult]) -> CheckResult:
    """The result of a check, with its seconds; one that cannot be carried out has failed."""
    progress(f"check: {name}")
    started = time.perf_counter()
    try:
        result = make()
    except (QwenOnnxError, OSError, ValueError, RuntimeError) as error:
        result = CheckResult(name=name, verdict=Verdict.FAIL, detail=f"could not be carried out: {error}")
    return result.model_copy(update={"seconds": round(time.perf_counter() - started, 2)})


def certain(value: float) -> Estimate:
    """A value without sampling error: both bounds are the value."""
    return Estimate(value=value, lower=value, upper=value)


def parity_result(name: str, cases: int, wrong: Sequence[Mismatch], extra: dict[str, float | str]) -> CheckResult:
    """PASS when nothing differs; the first three mismatches are told."""
    return CheckResult(
        name=name,
        verdict=Verdict.FAIL if wrong else Verdict.PASS,
        measured={"cases": cases, "mismatches": len(wrong), **extra},
        limit={"mismatches": 0},
        detail="; ".join(str(item) for item in wrong[:3]),
    )


def drift_result(
    found: DriftEstimates | None, limits: Limits, measured: Mapping[str, float | str] | None = None, detail: str = ""
) -> CheckResult:
    """The drift against its limits; None for logits that are not numbers."""
    bounds: dict[str, float | str] = {
        "kld_mean": limits.kld_mean,
        "kld_p99": limits.kld_p99,
        "top1": limits.top1,
        "ppl_ratio": limits.ppl_ratio,
        "worst_domain": limits.domain_factor * limits.kld_mean,
    }
    if found is None:
        return CheckResult(name="drift", verdict=Verdict.FAIL, limit=bounds, detail="a logit is NaN or infinite")
    verdicts = judge(found, limits)
    name, domain = max(found.domains.items(), key=lambda item: item[1].value)
    told: dict[str, float | str] = {"worst_domain_name": name, **(measured or {})}
    overall = {key: getattr(found, key) for key in ("kld_mean", "kld_p99", "top1", "ppl_ratio")}
    for key, item in {**overall, "worst_domain": domain}.items():
        told |= {key: item.value, f"{key}_lower": item.lower, f"{key}_upper": item.upper}
    broken = [f"{key} {verdict}" for key, verdict in verdicts.items() if verdict is not Verdict.PASS]
    return CheckResult(
        name="drift",
        verdict=worst(verdicts.values()),
        measured=told,
        limit=bounds,
        detail="; ".join(filter(None, (", ".join(broken), detail))),
    )


def agreement(found: Positions) -> tuple[list[Verdict], dict[str, float | str]]:
    """Verdicts on ``DECODE_LIMIT``, and what was measured."""
    kld, top1 = float(found.kld.mean()), float(found.agree.mean())
    verdicts = [at_most(certain(kld), DECODE_KLD), at_least(certain(top1), DECODE_TOP1)]
    return verdicts, {"kld_mean": kld, "top1": top1, "positions": len(found.kld)}


def batch_result(
    folder: Path, prompts: Mapping[str, Sequence[int]], scorer: Callable[[], Scorer], threads: int
) -> CheckResult:
    """Texts that share the steps of a batch against runs of their own; ``scorer`` loads what runs them alone."""
    limit = dict(DECODE_LIMIT)
    try:
        found = decode_positions(lambda texts: batched_logits(folder, texts, threads), scorer, prompts, threads)
    except UnsupportedGraphError as error:
        return CheckResult(
            name="batched", verdict=Verdict.PASS, limit=limit, detail=f"served one request at a time: {error.what}"
        )
    verdicts, measured = agreement(found)
    measured["streams"] = len(prompts)
    return CheckResult(name="batched", verdict=worst(verdicts), measured=measured, limit=limit)
