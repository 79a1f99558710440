"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL as a graph for one picture.

Patches stay in the order in which they come. A layer of windows gathers its queries, keys and values by windows,
[windows, patches of one, width], attends within each and puts the answers back, so that nothing grows with the square
of the picture; a layer that sees the whole picture leaves the scores to ONNX Runtime's flash attention.

What a picture's token gets of several layers (DeepStack) stands behind its features, in the same row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_onnx.export.drawing import FLOAT, INT64, MICROSOFT, Drawing
from qwen_onnx.sources.vision_config import THETA, Tower

PIXELS, GRID, FEATURES = "pixel_values", "image_grid_thw", "image_features"
CHANNELS = 3
EPSILON = 1e-6
QUICK_GELU, SILU = 1.702, 1.0


@dataclass(frozen=True)
class _Grid:
    """Names of what follows from the picture's size alone, in int64.

    ``sides`` in patches, ``down`` and ``across`` in merged ones. Of every patch: ``patches`` its number, ``merged`` row
    and column of the merged one that it belongs to, ``corner`` its number within that, ``axes`` its row and column.
    """

    sides: tuple[str, str]
    down: str
    across: str
    patches: str
    merged: tuple[str, str]
    corner: str
    axes: tuple[str, str]


@dataclass(frozen=True)
class _Places:
    """Names of what attention needs of the picture's size.

    ``cos``, ``sin`` [patches, head / 2] and ``order`` [1, patches] are for the rotary embedding; ``windows`` [windows,
    patches of one] says which patch is where, ``mask`` which of these are there, ``back`` [patches] where each went.
    """

    cos: str
    sin: str
    order: str
    windows: str = ""
    mask: str = ""
    back: str = ""


def draw_tower(draw: Drawing, tower: Tower, kind: int) -> None:
    """The whole encoder: ``PIXELS`` and ``GRID`` to ``FEATURES`` [patches / merge², features] of type ``kind``."""
    width = tower.width
    size = CHANNELS * tower.temporal_patch * tower.patch**2
    pixels = draw.node("Reshape", PIXELS, draw.integer([-1, size]))
    grid = _grid(draw, tower)
    state = draw.linear("visual.patch_embed.proj", pixels, size, width, bias=bool(tower.positions), exact=True)
    if tower.positions:
        state = draw.node("Add", state, _learned(draw, tower, grid))
    places, stacked = _places(draw, tower, grid), []
    for index in range(tower.depth):
        prefix = f"visual.blocks.{index}"
        normed = _norm(draw, tower, f"{prefix}.norm1", state)
        whole = not tower.window or index in tower.full
        state = draw.node("Add", state, _attention(draw, tower, f"{prefix}.attn", normed, places, whole))
        normed = _norm(draw, tower, f"{prefix}.norm2", state)
        state = draw.node("Add", state, _mlp(draw, tower, f"{prefix}.mlp", normed))
        if index in tower.deepstack:
            name = f"visual.deepstack_merger_list.{tower.deepstack.index(index)}"
            # the norm sees the patches of a token together, that of the last layer each by itself
            normed = _norm(draw, tower, f"{name}.norm", _merged(draw, tower, state), width * tower.merge**2)
            stacked.append(_tokens(draw, tower, name, normed))
    normed = _norm(draw, tower, f"visual.merger.{tower.style.norm}", state)
    features = _tokens(draw, tower, "visual.merger", _merged(draw, tower, normed))
    if stacked:
        draw.node("Concat", features, *stacked, axis=-1)
    draw.result(FEATURES, kind)


def inputs(tower: Tower) -> list[tuple[str, int, list[str | int]]]:
    """(name, type, shape) of each input."""
    size = CHANNELS * tower.temporal_patch * tower.patch**2
    return [(PIXELS, FLOAT, ["num_patches", size]), (GRID, INT64, [1, 3])]


def outputs(tower: Tower, kind: int) -> list[tuple[str, int, list[str | int]]]:
    """(name, type, shape) of the output."""
    return [(FEATURES, kind, ["num_tokens", tower.features])]


def _merged(draw: Drawing, tower: Tower, value: str) -> str:
    """The patches of a token beside each other, [tokens, width · merge²]."""
    return str(draw.node("Reshape", value, draw.integer([-1, tower.width * tower.merge**2])))


def _tokens(draw: Drawing, tower: Tower, name: str, merged: str) -> str:
    """Of merged patches, [tokens, output]."""
    (first, second), size = tower.style.merger, tower.width * tower.merge**2
    inner = draw.node("Gelu", draw.linear(f"{name}.{first}", merged, size, size))
    return draw.linear(f"{name}.{second}", inner, size, tower.output)


def _norm(draw: Drawing, tower: Tower, name: str, value: str, size: int | None = None) -> str:
    scale = draw.weight(f"{name}.weight", size or tower.width)
    if not tower.style.mlp:
        return str(draw.node("SimplifiedLayerNormalization", value, scale, axis=-1, epsilon=EPSILON, stash_type=1))
    bias = draw.weight(f"{name}.bias", size or tower.width)
    return str(draw.node("LayerNormalization", value, scale, bias, axis=-1, epsilon=EPSILON))


def _mlp(draw: Drawing, tower: Tower, name: str, value: str) -> str:
    width = tower.width
    if not tower.style.mlp:
        gate = draw.linear(f"{name}.gate_proj", value, width, tower.inner)
        opened = draw.node("QuickGelu", gate, domain=MICROSOFT, alpha=SILU)
        both = draw.node("Mul", opened, draw.linear(f"{name}.up_proj", value, width, tower.inner))
        return draw.linear(f"{name}.down_proj", both, tower.inner, width)
    first, second = tower.style.mlp
    inner = draw.linear(f"{name}.{first}", value, width, tower.inner)
    if tower.style.activation == "quick_gelu":
        active = draw.node("QuickGelu", inner, domain=MICROSOFT, alpha=QUICK_GELU)
    else:
        active = draw.node("Gelu", inner, approximate="tanh")
    return draw.linear(f"{name}.{second}", active, tower.inner, width)


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


def _over(draw: Drawing, value: str, by: str | int) -> tuple[str, str]:
    """Quotient and rest."""
    divisor = draw.integer(by) if isinstance(by, int) else by
    return draw.node("Div", value, divisor), draw.node("Mod", value, divisor)


def _plus(draw: Drawing, value: str, factor: str | int, rest: str) -> str:
    by = draw.integer(factor) if isinstance(factor, int) else factor
    return str(draw.node("Add", draw.node("Mul", value, by), rest))


def _grid(draw: Drawing, tower: Tower) -> _Grid:
    merge, unit = tower.merge, tower.merge**2
    sides = [draw.node("Gather", draw.node("Reshape", GRID, draw.integer([3])), draw.integer(side)) for side in (1, 2)]
    down, across = (_over(draw, side, merge)[0] for side in sides)
    count = draw.node("Mul", draw.node("Mul", down, across), draw.integer(unit))
    patches = draw.node("Range", draw.integer(0), count, draw.integer(1))
    block, corner = _over(draw, patches, unit)
    y, x = _over(draw, block, across)
    inner_y, inner_x = _over(draw, corner, merge)
    axes = _plus(draw, y, merge, inner_y), _plus(draw, x, merge, inner_x)
    return _Grid((sides[0], sides[1]), down, across, patches, (y, x), corner, axes)


def _learned(draw: Drawing, tower: Tower, grid: _Grid) -> str:
    """The table of learned positions stretched to the picture, [patches, width]: bilinear, corners on corners."""
    last, one = tower.positions - 1, draw.floats("one", np.ones(1))
    taps, shares = [], []
    for side, axis in zip(grid.sides, grid.axes, strict=True):
        # of one patch there is nothing to divide by
        steps = draw.node("Max", draw.node("Sub", side, draw.integer(1)), draw.integer(1))
        scaled = draw.node("Cast", draw.node("Mul", axis, draw.integer(last)), to=FLOAT)
        place = draw.node("Div", scaled, draw.node("Cast", steps, to=FLOAT))
        floor = draw.node("Floor", place)
        low = draw.node("Cast", floor, to=INT64)
        high = draw.node("Min", draw.node("Add", low, draw.integer(1)), draw.integer(last))
        far = draw.node("Unsqueeze", draw.node("Sub", place, floor), draw.integer([1]))
        taps.append((low, high))
        shares.append((draw.node("Sub", one, far), far))
    table = draw.weight("visual.pos_embed.weight", tower.positions**2, tower.width)
    parts = []
    for row, row_share in zip(taps[0], shares[0], strict=True):
        for column, column_share in zip(taps[1], shares[1], strict=True):
            found = draw.node("Gather", table, _plus(draw, row, tower.positions, column), axis=0)
            parts.append(draw.node("Mul", found, draw.node("Mul", row_share, column_share)))
    return str(draw.node("Sum", *parts))


def _places(draw: Drawing, tower: Tower, grid: _Grid) -> _Places:
    quarter = tower.width // tower.heads // 4
    rates = draw.floats("rates", 1.0 / THETA ** (np.arange(0, 2 * quarter, 2, dtype=np.float32) / (2 * quarter)))
    columns = [draw.node("Unsqueeze", draw.node("Cast", axis, to=FLOAT), draw.integer([1])) for axis in grid.axes]
    angles = draw.node("Concat", *(draw.node("Mul", column, rates) for column in columns), axis=-1)
    turns = {"cos": draw.node("Cos", angles), "sin": draw.node("Sin", angles)}
    turns["order"] = draw.node("Unsqueeze", grid.patches, draw.integer([0]))
    return _Places(**turns, **(_windows(draw, tower, grid) if tower.window else {}))


def _windows(draw: Drawing, tower: Tower, grid: _Grid) -> dict[str, str]:
    """``windows``, ``mask`` and ``back`` of ``_Places``."""
    side, unit, (y, x) = tower.window, tower.merge**2, grid.merged
    # rounded up
    windows_down, windows_across = (
        _over(draw, draw.node("Add", length, draw.integer(side - 1)), side)[0] for length in (grid.down, grid.across)
    )
    windows = draw.node("Mul", windows_down, windows_across)
    held = side * side * unit
    # of every place in every window, the patch that belongs there
    slots = draw.node("Range", draw.integer(0), draw.node("Mul", windows, draw.integer(held)), draw.integer(1))
    window, place = _over(draw, slots, held)
    merged, slot_corner = _over(draw, place, unit)
    window_y, window_x = _over(draw, window, windows_across)
    place_y, place_x = _over(draw, merged, side)
    slot_y, slot_x = _plus(draw, window_y, side, place_y), _plus(draw, window_x, side, place_x)
    inside = draw.node("And", draw.node("Less", slot_y, grid.down), draw.node("Less", slot_x, grid.across))
    patch = _plus(draw, _plus(draw, slot_y, grid.across, slot_x), unit, slot_corner)
    shape = draw.integer([-1, held])
    known = draw.node("Where", inside, patch, draw.integer(0))
    # and of every patch the place that it has
    (column_window, column_place), (row_window, row_place) = _over(draw, x, side), _over(draw, y, side)
    home = _plus(draw, row_window, windows_across, column_window)
    back = _plus(draw, home, held, _plus(draw, _plus(draw, row_place, side, column_place), unit, grid.corner))
    return {
        "windows": draw.node("Reshape", known, shape),
        "mask": draw.node("Cast", draw.node("Reshape", inside, shape), to=6),
        "back": back,
    }
