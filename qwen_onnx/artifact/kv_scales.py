"""How far keys and values reach, channel by channel: what an int8 KV cache is rounded by.

The file is an array of numpy's, float32 [layers, 2, heads, head size], keys before values, and the manifest has its
digest. Verification writes it into an artifact that may be served so.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from qwen_onnx.bounded import read_bytes
from qwen_onnx.errors import ArtifactError

KV_SCALES = "kv_scales.npy"
# of an 8-bit code
STEPS = 127
HEADER = 128  # bytes
Floats = np.ndarray[Any, np.dtype[np.float32]]


def scales_of(reach: Floats) -> Floats:
    """Scales for numbers that reach so far; a channel that was never used gets one that rounds it to zero."""
    return np.maximum(reach / STEPS, np.finfo(np.float32).tiny).astype("<f4")


def _header(sizes: tuple[int, ...]) -> bytes:
    """Of numpy's format 1.0, for one array alone: a stranger's file is compared with it, and never parsed."""
    told = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {sizes}, }}".encode()
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + told.ljust(HEADER - 11) + b"\n"


def write_kv_scales(folder: Path, scales: Floats) -> None:
    """Write the file."""
    (folder / KV_SCALES).write_bytes(_header(scales.shape) + np.ascontiguousarray(scales, "<f4").tobytes())


def read_kv_scales(folder: Path, sizes: tuple[int, ...]) -> Floats:
    """The scales of an artifact whose cache has these sizes.

    Raises:
        ArtifactError: it has none, those of another cache, or one that is not a positive number.
    """
    hint = f"qwen-onnx verify {folder} makes them and says what they cost, or why there are none"
    if not (folder / KV_SCALES).exists():
        raise ArtifactError("the artifact has no scales for an int8 KV cache", where=str(folder), hint=hint)
    wanted = HEADER + 4 * math.prod(sizes)
    body = read_bytes(folder / KV_SCALES, most_bytes=wanted, error=ArtifactError, hint=hint)
    if len(body) != wanted or not body.startswith(_header(sizes)):
        raise ArtifactError(f"{KV_SCALES} is not that of a KV cache of {sizes}", where=str(folder), hint=hint)
    found = np.frombuffer(body, "<f4", offset=HEADER).reshape(sizes)
    if not (np.isfinite(found) & (found > 0)).all():
        raise ArtifactError(f"{KV_SCALES} holds what is not a positive number", where=str(folder), hint=hint)
    return found
