"""The check of an int8 KV cache: its scales from calibration text, and what it adds to the drift.

An artifact gets the scales only where that keeps the limit, so that one which has them may be served with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qwen_onnx.artifact.kv_scales import Floats, scales_of
from qwen_onnx.export.calibration import calibration_ids
from qwen_onnx.processes.progress import progress
from qwen_onnx.records import Verdict
from qwen_onnx.runtime.engines.batch.layout import UnsupportedGraphError
from qwen_onnx.runtime.engines.batch.model import BatchModel
from qwen_onnx.runtime.engines.batch.steps import PREFILL_CHUNK
from qwen_onnx.verify.checks import TIMED, check
from qwen_onnx.verify.context import Context
from qwen_onnx.verify.drift import Scorer
from qwen_onnx.verify.records import CheckResult
from qwen_onnx.verify.scoring import Positions, compare
from qwen_onnx.verify.served import served_logits
from qwen_onnx.verify.statistics import at_most, bootstrap

# texts that the scales come from, in turn of each kind that the quantiser reads, too
WINDOWS, WINDOW, SEED = 16, 256, 0


def reach(held: Floats) -> Floats:
    """How far keys and values go from zero in each channel, [layers, 2, heads, head size].

    A key's channels are turned by its position two by two (RoPE, the first half of a head with the second): what both
    reach is the length of the pair, which no position changes. A text of a few hundred tokens turns the slow pairs too
    little to show it.

    Args:
        held: [layers, 2, heads, tokens, head size], see ``BatchModel.held``.
    """
    found = np.abs(held)
    half = held.shape[-1] // 2
    keys = found[:, 0]
    keys[..., :half] = keys[..., half:] = np.hypot(keys[..., :half], keys[..., half:])
    furthest: Floats = found.max(axis=3)
    return furthest


def calibrated(folder: Path, texts: Sequence[Sequence[int]], threads: int) -> Floats:
    """Scales by which no key and no value of ``texts`` is cut off.

    Raises:
        UnsupportedGraphError: the artifact is not served in batches, or has linear attention.
    """
    model = BatchModel(folder, rows=1, capacity=max(map(len, texts)), chunk=PREFILL_CHUNK, threads=threads)
    if model.states:
        raise UnsupportedGraphError("most layers keep states and no keys and values", where=str(folder))
    furthest = []
    for ids in texts:
        for begin in range(0, len(ids), PREFILL_CHUNK):
            model.extend(0, np.array([ids[begin : begin + PREFILL_CHUNK]]), [begin])
        furthest.append(reach(model.held(0, len(ids))))
    return scales_of(np.max(furthest, axis=0))


def int8_positions(
    folder: Path, scales: Floats, texts: Sequence[Sequence[int]], teacher: Scorer, threads: int
) -> list[Positions]:
    """The teacher's statistics of each text as it is served with an int8 cache, piece by piece.

    Raises:
        UnsupportedGraphError: the graph can have no such cache.
    """
    size = max(map(len, texts))
    model = BatchModel(folder, rows=1, capacity=size, chunk=PREFILL_CHUNK, threads=threads, kv_scales=lambda _: scales)
    if not model.tells_every_position:
        raise UnsupportedGraphError("its graph tells the last position alone", where=str(folder))
    found = []
    for ids in texts:
        found.append(compare(teacher.logits(ids), served_logits(model, ids), ids, threads))
    return found


@check("kv_int8", TIMED)
def int8_cache(context: Context) -> CheckResult:
    """What an int8 KV cache adds to the drift. The artifact gets the scales for one only where that keeps the limit.

    Without, nobody can serve it so: that is no fault of the artifact, and the report says why.
    """
    # their checks come later than this one
    from qwen_onnx.verify.hearing import hears
    from qwen_onnx.verify.sight import sees

    allowed = context.limits.kv_int8_kld
    if allowed is None or sees(context.artifact) or hears(context.artifact):
        reason = "no limit set" if allowed is None else "the scales are those of text, and this model takes more"
        return CheckResult(name="kv_int8", verdict=Verdict.PASS, detail=f"not offered: {reason}")
    study, threads = context.study, context.options.threads
    plain = {name: parts[0] for name, parts in study.parts.items()}
    texts = {name: next(window.ids for window in study.used if window.domain == name) for name in plain}
    if not study.finite:
        return CheckResult(name="kv_int8", verdict=Verdict.FAIL, detail="a logit is NaN or infinite")
    context.unload()
    try:
        progress(f"int8 KV cache: scales from {WINDOWS} texts")
        ids = calibration_ids(context.truth.tokenizer, WINDOWS, WINDOW, SEED)
        scales = calibrated(context.artifact, ids, threads)
        progress(f"int8 KV cache: drift on {len(texts)} texts")
        found = int8_positions(context.artifact, scales, list(texts.values()), context.teacher, threads)
    except UnsupportedGraphError as error:
        return CheckResult(name="kv_int8", verdict=Verdict.PASS, detail=f"not offered: {error.what}")
    return _judged(context, allowed, scales, plain, dict(zip(texts, found, strict=True)))


def _judged(
    context: Context, allowed: float, scales: Floats, plain: dict[str, Positions], found: dict[str, Positions]
) -> CheckResult:
    options = context.options
    apart = {name: [replace(part, kld=part.kld - plain[name].kld)] for name, part in found.items()}
    added = bootstrap(apart, block=options.block, resamples=options.resamples, seed=options.seed).kld_mean
    offered = at_most(added, allowed) is Verdict.PASS
    if offered:
        context.kv_scales = scales
    one, other = Positions.join(list(found.values())), Positions.join(list(plain.values()))
    return CheckResult(
        name="kv_int8",
        verdict=Verdict.PASS,
        measured={
            "added_kld": added.value,
            "added_kld_lower": added.lower,
            "added_kld_upper": added.upper,
            "kld_mean": float(one.kld.mean()),
            "float_kld_mean": float(other.kld.mean()),
            "top1": float(one.agree.mean()),
            "float_top1": float(other.agree.mean()),
            "positions": len(one.kld),
        },
        limit={"added_kld": allowed},
        detail="offered: serve --kv-cache int8" if offered else "not offered: the limit is not kept",
    )
