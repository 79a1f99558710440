"""Verification: proves an artifact against the checkpoint it came from, or says why it does not.

What is measured is what is served: the artifact runs through ``qwen_onnx.runtime``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from qwen_onnx.artifact.draft_head import has_draft_head
from qwen_onnx.artifact.kv_scales import write_kv_scales
from qwen_onnx.catalog.schema import Limits, Verification
from qwen_onnx.errors import VerificationError
from qwen_onnx.records import Verdict
from qwen_onnx.verify import kv_cache, speed  # noqa: F401 - register their checks
from qwen_onnx.verify.checks import ASKED, CHECKS, LEVELS, SIMULATED, beyond, run_check
from qwen_onnx.verify.context import Context, Runner
from qwen_onnx.verify.draft_head import CHECK as DRAFT_HEAD_CHECK
from qwen_onnx.verify.hearing import AUDIBLE, hears
from qwen_onnx.verify.keeping import Keep
from qwen_onnx.verify.records import CheckResult, VerifyOptions, worst
from qwen_onnx.verify.report import Report, environment, print_report
from qwen_onnx.verify.scratch import scratch_folder
from qwen_onnx.verify.sight import VISUAL, sees
from qwen_onnx.verify.tasks import check as _registered  # noqa: F401

__all__ = ["CheckResult", "Keep", "Report", "Verdict", "VerifyOptions", "print_report", "verify_artifact"]

DEFAULT_OPTIONS = VerifyOptions()


def verify_artifact(
    artifact: Path,
    checkpoint: Path,
    reference: Path | None,
    limits: Limits,
    *,
    level: Verification = Verification.RUN,
    options: VerifyOptions = DEFAULT_OPTIONS,
    runner: Callable[[Path], Runner] | None = None,
    simulator: Callable[[Path], Runner] | None = None,
    cache: Path | None = None,
    keep: Keep | None = None,
) -> Report:
    """Run every check on ``artifact`` that its verification level promises; the report names the others.

    Args:
        artifact: flat folder that the runtime serves.
        checkpoint: Hugging Face folder that the artifact was made from.
        reference: fp32 export of the same checkpoint, which artifacts of other engines than ours need: without it their
            verdict is at best INCONCLUSIVE.
        limits: what the artifact must reach.
        level: how artifacts of this target are judged here.
        options: how much is measured; with ``layers_at_once`` the artifact is run in slices, and judged at that level.
        runner: what runs the two folders; None is ONNX Runtime and onnxruntime-genai.
        simulator: what runs the artifact as the device would, much more slowly.
        cache: keeps what a killed verification had computed, for the next one of the same checkpoint; None keeps
            nothing.
        keep: where to write the golden file, by which other devices prove the artifact, and the scales of an int8 KV
            cache; None: nowhere.

    Raises:
        VerificationError: a folder is missing, a check has no such name, the level cannot make it, or the artifact
            cannot be run in slices. Checks that fail do not raise.
    """
    if options.layers_at_once:
        level = _level_in_slices(level, alone=runner is None and reference is None)
    asked = {name for name, asks in ASKED.items() if asks(options)}
    # what no text model could have is not missed in one
    lacking = (frozenset() if sees(artifact) else VISUAL) | (frozenset() if hears(artifact) else AUDIBLE)
    lacking |= frozenset() if has_draft_head(artifact) else {DRAFT_HEAD_CHECK}
    lacking -= set(options.checks)
    left_out = {
        name: reason
        for name, reason in beyond(level).items()
        if (name not in ASKED or name in asked) and name not in lacking
    }
    named = set(options.checks) & set(left_out)
    if level is Verification.IN_SLICES:
        # that memory was short is no fault of whoever named them
        left_out = {name: reason for name, reason in left_out.items() if name not in named}
    impossible = sorted((named | asked) & set(left_out))
    if impossible:
        raise VerificationError(f"{', '.join(impossible)} cannot be checked: {level.text}")
    unknown = sorted(set(options.checks) - set(CHECKS))
    if unknown:
        raise VerificationError(f"No check is called {', '.join(unknown)}.", hint=f"choose from {', '.join(CHECKS)}")
    for folder in filter(None, (artifact, checkpoint, reference)):
        if not folder.is_dir():
            raise VerificationError("The folder to verify with does not exist.", where=str(folder))
    started = time.perf_counter()
    with scratch_folder(cache, checkpoint) as scratch:
        context = Context(artifact, checkpoint, reference, limits, level, options, runner, simulator, scratch, keep)
        made = [name for name in CHECKS if name not in {*left_out, *lacking} and (name not in ASKED or name in asked)]
        results = tuple(run_check(name, context) for name in made)
        context.release()
    if keep and context.golden:
        context.golden.save(keep.folder)
    if keep and context.kv_scales is not None:
        write_kv_scales(keep.folder, context.kv_scales)
    verdict = worst(item.verdict for item in results)
    return Report(
        verdict=verdict,
        verification=level,
        claim=level.claim(verdict),
        checks=results,
        # a simulator stands for a device: only targets that have one could miss it
        not_checked={name: reason for name, reason in left_out.items() if LEVELS[name] != SIMULATED},
        drift=context.drift,
        latency=context.latency,
        tasks=context.tasks,
        limits=limits,
        options=options,
        environment={**environment(), "seconds": round(time.perf_counter() - started, 1)},
    )


def _level_in_slices(level: Verification, *, alone: bool) -> Verification:
    if not alone or level not in (Verification.RUN, Verification.NUMERICS_ON_CPU):
        raise VerificationError(f"only what ONNX Runtime runs by itself can be run in slices, not: {level.text}")
    return Verification.IN_SLICES
