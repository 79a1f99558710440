"""The vision towers of Qwen2-VL and Qwen2.5-VL as a graph for one picture.

Patches stay in the order in which they come. A layer of windows gathers its queries, keys and values by windows,
[windows, patches of one, width], attends within each and puts the answers back, so that nothing grows with the square
of the picture; a layer that sees the whole picture leaves the scores to ONNX Runtime's flash attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_onnx.export.passes.vision_encoder.drawing import FLOAT, INT64, MICROSOFT, Drawing
from qwen_onnx.sources.vision_config import THETA, Tower

PIXELS, GRID, FEATURES = "pixel_values", "image_grid_thw", "image_features"
CHANNELS = 3
EPSILON = 1e-6
QUICK_GELU, SILU = 1.702, 1.0


@dataclass(frozen=True)
class _Places:
    """Names of what follows from the picture's size alone.

    ``cos``, ``sin`` [patches, head / 2] and ``order`` [1, patches] are for the rotary embedding; ``windows`` [windows,
    patches of one] says which patch is where, ``mask`` which of these are there, ``back`` [patches] where each went.
    """

    cos: str
    sin: str
    order: str
    windows: str = ""
    mask: str = ""
    back: str = ""


def draw_tower(draw: Drawing, tower: Tower) -> None:
    """The whole encoder: ``PIXELS`` and ``GRID`` to ``FEATURES`` [patches / merge², output]."""
    width, unit = tower.width, tower.merge**2
    size = CHANNELS * tower.temporal_patch * tower.patch**2
    pixels = draw.node("Reshape", PIXELS, draw.integer([-1, size]))
    state = draw.node("Gemm", pixels, draw.weight("visual.patch_embed.proj.weight", width, size), transB=1)
    places = _places(draw, tower)
    for index in range(tower.depth):
        prefix = f"visual.blocks.{index}"
        normed = _norm(draw, tower, f"{prefix}.norm1", state)
        whole = not tower.window or index in tower.full
        state = draw.node("Add", state, _attention(draw, tower, f"{prefix}.attn", normed, places, whole))
        normed = _norm(draw, tower, f"{prefix}.norm2", state)
        state = draw.node("Add", state, _mlp(draw, tower, f"{prefix}.mlp", normed))
    merged = draw.node("Reshape", _norm(draw, tower, "visual.merger.ln_q", state), draw.integer([-1, width * unit]))
    inner = draw.linear("visual.merger.mlp.0", merged, width * unit, width * unit)
    features = draw.linear("visual.merger.mlp.2", draw.node("Gelu", inner), width * unit, tower.output)
    draw.nodes[-1].output[0] = FEATURES
    assert features != FEATURES, "renamed in place"


def inputs(tower: Tower) -> list[tuple[str, int, list[str | int]]]:
    """(name, type, shape) of each input."""
    size = CHANNELS * tower.temporal_patch * tower.patch**2
    return [(PIXELS, FLOAT, ["num_patches", size]), (GRID, INT64, [1, 3])]


def outputs(tower: Tower) -> list[tuple[str, int, list[str | int]]]:
    """(name, type, shape) of the output."""
    return [(FEATURES, FLOAT, ["num_tokens", tower.output])]


def _norm(draw: Drawing, tower: Tower, name: str, value: str) -> str:
    scale = draw.weight(f"{name}.weight", tower.width)
    if tower.gated:
        return str(draw.node("SimplifiedLayerNormalization", value, scale, axis=-1, epsilon=EPSILON, stash_type=1))
    bias = draw.weight(f"{name}.bias", tower.width)
    return str(draw.node("LayerNormalization", value, scale, bias, axis=-1, epsilon=EPSILON))


def _mlp(draw: Drawing, tower: Tower, name: str, value: str) -> str:
    width = tower.width
    if tower.gated:
        gate = draw.linear(f"{name}.gate_proj", value, width, tower.inner)
        opened = draw.node("QuickGelu", gate, domain=MICROSOFT, alpha=SILU)
        both = draw.node("Mul", opened, draw.linear(f"{name}.up_proj", value, width, tower.inner))
        return draw.linear(f"{name}.down_proj", both, tower.inner, width)
    inner = draw.linear(f"{name}.fc1", value, width, tower.inner)
    return draw.linear(
        f"{name}.fc2", draw.node("QuickGelu", inner, domain=MICROSOFT, alpha=QUICK_GELU), tower.inner, width
    )


def _attention(draw: Drawing, tower: Tower, name: str, value: str, places: _Places, whole: bool) -> str:
    width = tower.width
    joined = draw.linear(f"{name}.qkv", value, width, 3 * width)
    query, key, values = draw.node("Split", joined, outputs=3, axis=-1, num_outputs=3)
    query, key = (_turned(draw, tower, part, places) for part in (query, key))
    if whole:
        batched = [draw.node("Unsqueeze", part, draw.integer([0])) for part in (query, key, values)]
        seen = draw.node("MultiHeadAttention", *batched, domain=MICROSOFT, num_heads=tower.heads)
        answer = draw.node("Reshape", seen, draw.integer([-1, width]))
    else:
        batched = [draw.node("Gather", part, places.windows, axis=0) for part in (query, key, values)]
        seen = draw.node("MultiHeadAttention", *batched, "", places.mask, domain=MICROSOFT, num_heads=tower.heads)
        flat = draw.node("Reshape", seen, draw.integer([-1, width]))
        answer = draw.node("Gather", flat, places.back, axis=0)
    return draw.linear(f"{name}.proj", answer, width, width)


def _turned(draw: Drawing, tower: Tower, value: str, places: _Places) -> str:
    """[patches, width] by the rotary positions of row and column."""
    batched = draw.node("Unsqueeze", value, draw.integer([0]))
    turned = draw.node(
        "RotaryEmbedding", batched, places.order, places.cos, places.sin, domain=MICROSOFT, num_heads=tower.heads
    )
    return str(draw.node("Reshape", turned, draw.integer([-1, tower.width])))


def _places(draw: Drawing, tower: Tower) -> _Places:
    merge, unit = tower.merge, tower.merge**2

    def over(value: str, by: str | int) -> tuple[str, str]:
        """Quotient and rest."""
        divisor = draw.integer(by) if isinstance(by, int) else by
        return draw.node("Div", value, divisor), draw.node("Mod", value, divisor)

    def plus(value: str, factor: str | int, rest: str) -> str:
        by = draw.integer(factor) if isinstance(factor, int) else factor
        return str(draw.node("Add", draw.node("Mul", value, by), rest))

    sides = [draw.node("Gather", draw.node("Reshape", GRID, draw.integer([3])), draw.integer(side)) for side in (1, 2)]
    # in merged patches
    down, across = (over(side, merge)[0] for side in sides)
    count = draw.node("Mul", draw.node("Mul", down, across), draw.integer(unit))
    patches = draw.node("Range", draw.integer(0), count, draw.integer(1))
    block, corner = over(patches, unit)
    y, x = over(block, across)
    inner_y, inner_x = over(corner, merge)
    axes = [plus(y, merge, inner_y), plus(x, merge, inner_x)]
    quarter = tower.width // tower.heads // 4
    rates = draw.floats("rates", 1.0 / THETA ** (np.arange(0, 2 * quarter, 2, dtype=np.float32) / (2 * quarter)))
    columns = [draw.node("Unsqueeze", draw.node("Cast", axis, to=FLOAT), draw.integer([1])) for axis in axes]
    angles = draw.node("Concat", *(draw.node("Mul", column, rates) for column in columns), axis=-1)
    turns = {"cos": draw.node("Cos", angles), "sin": draw.node("Sin", angles)}
    turns["order"] = draw.node("Unsqueeze", patches, draw.integer([0]))
    if not tower.window:
        return _Places(**turns)
    side = tower.window
    # rounded up
    windows_down, windows_across = (
        over(draw.node("Add", length, draw.integer(side - 1)), side)[0] for length in (down, across)
    )
    windows = draw.node("Mul", windows_down, windows_across)
    held = side * side * unit
    # of every place in every window, the patch that belongs there
    slots = draw.node("Range", draw.integer(0), draw.node("Mul", windows, draw.integer(held)), draw.integer(1))
    window, place = over(slots, held)
    merged, slot_corner = over(place, unit)
    window_y, window_x = over(window, windows_across)
    place_y, place_x = over(merged, side)
    slot_y, slot_x = plus(window_y, side, place_y), plus(window_x, side, place_x)
    inside = draw.node("And", draw.node("Less", slot_y, down), draw.node("Less", slot_x, across))
    patch = plus(plus(slot_y, across, slot_x), unit, slot_corner)
    shape = draw.integer([-1, held])
    known = draw.node("Where", inside, patch, draw.integer(0))
    # and of every patch the place that it has
    (column_window, column_place), (row_window, row_place) = over(x, side), over(y, side)
    home = plus(row_window, windows_across, column_window)
    back = plus(home, held, plus(plus(row_place, side, column_place), unit, corner))
    return _Places(
        **turns,
        windows=draw.node("Reshape", known, shape),
        mask=draw.node("Cast", draw.node("Reshape", inside, shape), to=6),
        back=back,
    )
