"""The checks of speed and memory: the artifact beside PyTorch, each in a process of its own."""

from __future__ import annotations

from qwen_onnx.catalog.schema import Limits
from qwen_onnx.records import Verdict
from qwen_onnx.verify import latency
from qwen_onnx.verify.checks import TIMED, check
from qwen_onnx.verify.context import Context
from qwen_onnx.verify.records import CheckResult, Estimate, Latency, worst
from qwen_onnx.verify.results import certain
from qwen_onnx.verify.statistics import at_least, at_most

CONTROL_WIDTH = 0.15  # an A/A comparison with bounds further from 1 than this says that the machine is too noisy
NOISE = f"the artifact against itself differs by more than {CONTROL_WIDTH:.0%}: too noisy"


@check("latency", TIMED)
def paired_latency(context: Context) -> CheckResult:
    """The artifact is as much faster than PyTorch as the limits ask, measured side by side."""
    prompt, limits = _long_prompt(context), context.limits
    context.release()
    found = latency.measure(
        context.artifact,
        context.checkpoint,
        prompt,
        context.options,
        settled=lambda latency: _speed_verdict(latency, limits) is not Verdict.INCONCLUSIVE,
    )
    context.latency = found
    measured: dict[str, float | str] = {}
    if found.share_of_limit is not None:
        measured["share_of_limit"] = found.share_of_limit
    for key in ("decode_speedup", "prefill_speedup", "control"):
        item: Estimate = getattr(found, key)
        measured |= {key: item.value, f"{key}_lower": item.lower, f"{key}_upper": item.upper}
    return CheckResult(
        name="latency",
        verdict=_speed_verdict(found, limits),
        measured=measured,
        limit=dict(_asked(limits)),
        detail="; ".join(filter(None, (NOISE if _noisy(found) else "", _computed(found)))),
    )


def _computed(found: Latency) -> str:
    return f"PyTorch does not fit in memory: {found.baseline.computed}" if found.baseline.computed else ""


def _asked(limits: Limits) -> dict[str, float]:
    asked = {"decode_speedup": limits.decode_speedup, "prefill_speedup": limits.prefill_speedup}
    return {name: limit for name, limit in asked.items() if limit is not None}


def _noisy(found: Latency) -> bool:
    return found.control.lower < 1 - CONTROL_WIDTH or found.control.upper > 1 + CONTROL_WIDTH


def _speed_verdict(found: Latency, limits: Limits) -> Verdict:
    verdicts = [at_least(getattr(found, name), limit) for name, limit in _asked(limits).items()]
    verdict = worst(verdicts) if verdicts else Verdict.PASS
    return Verdict.INCONCLUSIVE if verdicts and verdict is Verdict.PASS and _noisy(found) else verdict


def _long_prompt(context: Context) -> list[int]:
    ids = [token for pool in context.pools.values() for window in pool for token in window.ids]
    return ids[: context.options.prompt_tokens]


@check("memory", TIMED)
def peak_memory(context: Context) -> CheckResult:
    """The artifact needs the fraction of PyTorch's peak memory that the limits allow."""
    found, allowed = context.latency, context.limits.max_memory
    if found is None:
        return CheckResult(name="memory", verdict=Verdict.INCONCLUSIVE, detail="taken from the latency check: not run")
    share = found.artifact.peak_rss / found.baseline.peak_rss
    measured: dict[str, float | str] = {"of_pytorch": share, "bytes": found.artifact.peak_rss}
    if allowed is None:
        return CheckResult(name="memory", verdict=Verdict.PASS, measured=measured, detail="no limit set")
    return CheckResult(
        name="memory",
        verdict=at_most(certain(share), allowed),
        measured=measured,
        limit={"of_pytorch": allowed},
        detail=_computed(found),
    )
