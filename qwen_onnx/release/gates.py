"""Judge gates by what the report measured, as the checks do: by bounds, unrounded."""

from __future__ import annotations

import math

from qwen_onnx.artifact.manifest import Manifest
from qwen_onnx.records import Verdict
from qwen_onnx.release.matrix import UPPER, Gates
from qwen_onnx.release.records import GateResult
from qwen_onnx.verify.records import Estimate
from qwen_onnx.verify.report import Report
from qwen_onnx.verify.statistics import at_least, at_most

DRIFT = ("kld_mean", "kld_p99", "top1", "ppl_ratio")
LATENCY = ("decode_speedup", "prefill_speedup")


def estimates(report: Report | None) -> dict[str, Estimate]:
    """Every figure of the report that a gate may name."""
    found: dict[str, Estimate] = {}
    if report and report.drift:
        found |= {name: getattr(report.drift, name) for name in DRIFT}
    if report and report.latency:
        found |= {name: getattr(report.latency, name) for name in LATENCY}
    return found


def judge(gates: Gates, manifest: Manifest, report: Report | None) -> tuple[GateResult, ...]:
    """The verdict first, then each limit that ``gates`` sets."""
    found = estimates(report)
    size = _measured_bytes(manifest, report)
    found["max_bytes"] = Estimate(value=size, lower=size, upper=size)
    return (_verdict(gates, manifest), *(_limit(name, limit, found.get(name)) for name, limit in gates.limits.items()))


def _measured_bytes(manifest: Manifest, report: Report | None) -> float:
    """As the check of the size counted them; of an artifact without a report, all its files."""
    checks = report.checks if report else ()
    counted = next((check.measured["bytes"] for check in checks if check.name == "size"), manifest.size_bytes)
    return float(counted)


def _verdict(gates: Gates, manifest: Manifest) -> GateResult:
    allowed = (Verdict.PASS, Verdict.UNVERIFIED) if gates.unverified == "allow" else (Verdict.PASS,)
    verdict = Verdict.PASS if manifest.verdict in allowed else Verdict.FAIL
    return GateResult(
        name="verdict",
        limit=" or ".join(allowed),
        measured=manifest.verdict,
        verdict=verdict,
    )


def _limit(name: str, limit: float, found: Estimate | None) -> GateResult:
    if found is None:
        return GateResult(name=name, limit=limit, verdict=Verdict.INCONCLUSIVE)
    verdict = (at_most if name in UPPER else at_least)(found, limit)
    if not all(map(math.isfinite, (found.value, found.lower, found.upper))):
        return GateResult(name=name, limit=limit, measured="not finite", verdict=verdict)
    return GateResult(
        name=name, limit=limit, measured=found.value, lower=found.lower, upper=found.upper, verdict=verdict
    )
