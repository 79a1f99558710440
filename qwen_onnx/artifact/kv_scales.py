"""How far keys and values reach, channel by channel: what an int8 KV cache is rounded by.

The file is float32 numbers and nothing else, [layers, 2, heads, head size], keys before values: ``genai_config.json``
says how many, and the manifest has its digest. Verification writes it into an artifact that may be served so.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from qwen_onnx.bounded import read_bytes
from qwen_onnx.errors import ArtifactError

KV_SCALES = "kv_scales.bin"
# of an 8-bit code
STEPS = 127
Floats = np.ndarray[Any, np.dtype[np.float32]]


def scales_of(reach: Floats) -> Floats:
    """Scales for numbers that reach so far; a channel that was never used gets one that rounds it to zero."""
    return np.maximum(reach / STEPS, np.finfo(np.float32).tiny).astype("<f4")


def write_kv_scales(folder: Path, scales: Floats) -> None:
    """Write the file."""
    (folder / KV_SCALES).write_bytes(np.ascontiguousarray(scales, "<f4").tobytes())


def read_kv_scales(folder: Path, sizes: tuple[int, ...]) -> Floats:
    """The scales of an artifact whose cache has these sizes.

    Raises:
        ArtifactError: it has none, too few or too many, or one that is not a positive number.
    """
    hint = f"qwen-onnx verify {folder} makes them and says what they cost, or why there are none"
    if not (folder / KV_SCALES).exists():
        raise ArtifactError("the artifact has no scales for an int8 KV cache", where=str(folder), hint=hint)
    wanted = 4 * math.prod(sizes)
    body = read_bytes(folder / KV_SCALES, most_bytes=wanted, error=ArtifactError, hint=hint)
    if len(body) != wanted:
        what = f"{KV_SCALES} has {len(body):,} bytes, the KV cache needs {wanted:,}"
        raise ArtifactError(what, where=str(folder), hint=hint)
    found = np.frombuffer(body, "<f4").reshape(sizes)
    if not (np.isfinite(found) & (found > 0)).all():
        raise ArtifactError(f"{KV_SCALES} holds what is not a positive number", where=str(folder), hint=hint)
    return found
