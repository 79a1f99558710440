"""Stacked experts of Qwen3-VL's mixtures in the layout of a Qwen3-MoE.

Published checkpoints have ``gate_up_proj`` as [experts, hidden, 2 * inner] and ``down_proj`` as [experts, inner,
hidden]; a Qwen3-MoE, and a Qwen3-VL that transformers made, has outputs before inputs. Of a shape that both layouts
give, nobody can tell which it is.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_onnx.errors import SourceError, UnsupportedModelError

NAME = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")
BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Experts:
    """How many there are, and their sides."""

    count: int
    hidden: int
    inner: int

    def shape(self, kind: str) -> list[int]:
        """Of the experts in a Qwen3-MoE."""
        return [self.count, *((2 * self.inner, self.hidden) if kind == "gate_up_proj" else (self.hidden, self.inner))]


@dataclass(frozen=True)
class Turned:
    """Matrices that lie one behind another in a file's data and are transposed there."""

    begin: int
    count: int
    rows: int
    columns: int
    size: int


def turn_header(header: dict[str, Any], experts: Experts, where: str) -> list[Turned]:
    """Give the experts in a safetensors ``header`` the shapes of a Qwen3-MoE; says which bytes are to follow.

    Raises:
        UnsupportedModelError: experts of another shape, or of one that does not say how they are laid out.
        SourceError: the header contradicts itself.
    """
    found = []
    for name, told in header.items():
        kind = NAME.search(name)
        if kind is None:
            continue
        wanted = experts.shape(kind[1])
        count, outputs, inputs = wanted
        if not isinstance(told, dict) or told.get("shape") not in (wanted, [count, inputs, outputs]):
            shape = told.get("shape") if isinstance(told, dict) else None
            raise UnsupportedModelError(
                f"{name} is {str(shape)[:60]}, its config says {wanted} or {[count, inputs, outputs]}",
                where=where,
                hint="use the model's own config.json",
            )
        if outputs == inputs:
            raise UnsupportedModelError(
                f"{name} is {wanted}, which does not tell inputs from outputs",
                where=where,
                hint="save it as a Qwen3-MoE with a matrix of its own for each expert",
            )
        if told["shape"] == wanted:
            continue
        size = BYTES.get(str(told.get("dtype")), 0)
        match told.get("data_offsets"):
            case [int(begin), int(end)] if size and begin >= 0 and end - begin == size * math.prod(wanted):
                found.append(Turned(begin, count, inputs, outputs, size))
            case _:
                raise SourceError(f"the header of the weights is damaged at {name}", where=where, hint="fetch it again")
        told["shape"] = wanted
    return found


def turn_data(path: Path, start: int, found: list[Turned]) -> None:
    """Transpose matrices of a file whose data begin at ``start``, one at a time.

    Raises:
        SourceError: the file ends before one.
    """
    with path.open("r+b") as file:
        for item in found:
            length = item.rows * item.columns * item.size
            for index in range(item.count):
                place = start + item.begin + index * length
                file.seek(place)
                raw = file.read(length)
                if len(raw) != length:
                    raise SourceError("the weights end too early", where=str(path.name), hint="fetch it again")
                matrix = np.frombuffer(raw, f"u{item.size}").reshape(item.rows, item.columns)
                file.seek(place)
                file.write(matrix.T.tobytes())
