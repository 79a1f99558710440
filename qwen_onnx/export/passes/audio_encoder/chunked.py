"""The audio tower of Qwen3-ASR as a graph for one window of a sound.

Chunks of 100 frames are convolved each for itself, and tokens hear no further than their window of several chunks:
nothing of one window depends on another. The graph computes one, without a mask over it, and is run for each; what a
sound takes of memory does not grow with it. A sound's last chunk is filled with zeros, as transformers fills it: the
later convolutions see what the earlier ones make of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen_onnx.artifact.audio_config import REDUCED
from qwen_onnx.export.drawing import Drawing
from qwen_onnx.export.passes.audio_encoder.tower import FEATURES, FRAMES, MEL, first, layers, norm
from qwen_onnx.sources.chunked_tower import ChunkedTower

KERNEL, STRIDE = 3, 2
LONGEST_WAVE = 10_000


def draw_tower(draw: Drawing, tower: ChunkedTower, kind: int) -> None:
    """A window: ``MEL`` [1, bands, frames] of whole chunks, and ``FRAMES`` of the sound, to ``FEATURES``."""
    placed = draw.node("Add", _convolved(draw, tower), draw.floats("positions", positions(tower.places, tower.width)))
    state = first(draw, draw.node("Reshape", placed, draw.integer([-1, tower.width])), _tokens(draw, tower))
    state = norm(draw, "audio_tower.ln_post", layers(draw, tower, state, biased="qkv"), tower.width)
    inner = draw.node("Gelu", draw.linear("multi_modal_projector.linear_1", state, tower.width, tower.width))
    draw.linear("multi_modal_projector.linear_2", inner, tower.width, tower.output)
    draw.result(FEATURES, kind)


def positions(places: int, width: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Whisper's sines and cosines, [places, width]: no checkpoint holds them."""
    half = width // 2
    step = np.float32(np.log(LONGEST_WAVE) / (half - 1))
    turned = np.arange(places, dtype=np.float32)[:, None] * np.exp(-step * np.arange(half, dtype=np.float32))
    return np.concatenate([np.sin(turned), np.cos(turned)], axis=1)


def _tokens(draw: Drawing, tower: ChunkedTower) -> str:
    """How many tokens the frames take: those of whole chunks, and one for each eight of the rest."""
    chunk = draw.integer([tower.chunk])
    rest = draw.node("Add", draw.node("Mod", FRAMES, chunk), draw.integer([REDUCED - 1]))
    whole = draw.node("Mul", draw.node("Div", FRAMES, chunk), draw.integer([tower.places]))
    return str(draw.node("Add", whole, draw.node("Div", rest, draw.integer([REDUCED]))))


def _convolved(draw: Drawing, tower: ChunkedTower) -> str:
    """[chunks, places, width]."""
    split = draw.node("Reshape", MEL, draw.integer([tower.bands, -1, tower.chunk]))
    state = draw.node("Unsqueeze", draw.node("Transpose", split, perm=[1, 0, 2]), draw.integer([1]))
    for index, inner in enumerate((1, tower.channels, tower.channels), 1):
        name = f"audio_tower.conv2d{index}"
        weight = draw.weight(f"{name}.weight", tower.channels, inner, KERNEL, KERNEL)
        bias = draw.weight(f"{name}.bias", tower.channels)
        form: dict[str, Any] = {"kernel_shape": [KERNEL] * 2, "pads": [1] * 4, "strides": [STRIDE] * 2}
        state = draw.node("Gelu", draw.node("Conv", state, weight, bias, **form))
    joined = tower.channels * tower.heights
    rows = draw.node("Reshape", draw.node("Transpose", state, perm=[0, 3, 1, 2]), draw.integer([-1, joined]))
    flat = draw.linear("audio_tower.conv_out", rows, joined, tower.width, bias=False)
    return str(draw.node("Reshape", flat, draw.integer([-1, tower.places, tower.width])))
