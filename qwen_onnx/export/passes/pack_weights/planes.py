"""What becomes of a constant: planes of bits or half precision, and the nodes that make it again under its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_onnx.artifact.stored import FLOAT, FLOAT16, UINT8, Array, is_external, mapped_bytes
from qwen_onnx.errors import ExportError
from qwen_onnx.export.passes.pack_weights.data_file import DataFile
from qwen_onnx.export.passes.pack_weights.options import PIECE

# widths of the planes for codes of so many bits, the highest bits first; each divides a byte
WIDTHS = {4: (4,), 5: (4, 1), 6: (4, 2)}
# codes of a plane of one bit in a byte: rows that it does not divide stay as they are
MOST_CODES_IN_A_BYTE = 8


class Packer:
    """Writes constants of a graph into a file of weights.

    Attributes:
        tensors: initialisers of the packed graph.
        nodes: they make the constants that are stored otherwise; none reads anything but ``tensors`` and one another.
    """

    def __init__(self, data: DataFile) -> None:
        self.data = data
        self.tensors: list[Any] = []
        self.nodes: list[Any] = []
        self._shared: set[str] = set()

    def copy(self, tensor: Any, source: Path) -> None:
        """As it is stored in the graph ``source``."""
        if not is_external(tensor):
            self.tensors.append(tensor)
            return
        length = next((int(item.value) for item in tensor.external_data if item.key == "length"), None)
        if length is None:
            raise ExportError(f"{tensor.name} does not say how long its data are", where=str(source))
        self._store(tensor.name, tensor.data_type, tensor.dims, [mapped_bytes(tensor, source, length, ExportError)])

    def scales(self, tensor: Any, values: Array) -> None:
        """float32 of any shape: in half precision where that is exact, else as they are."""
        # beyond the range they become infinite, which is not exact
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.array_equal(halves.astype(np.float32), values):
            self._store(tensor.name, FLOAT, tensor.dims, [values])
            return
        stored = f"{tensor.name}.half"
        self._store(stored, FLOAT16, tensor.dims, [halves])
        self._make("Cast", [stored], tensor.name, to=FLOAT)

    def codes(self, tensor: Any, values: Array) -> None:
        """uint8 of any shape: in planes if all are below 2**6 and rows divide into bytes, else as they are."""
        # zero points have no dimension for the inputs: they are one row
        rows = values.reshape(len(values) if values.ndim == 3 else 1, -1)
        bits = max(*(int(piece.max()).bit_length() for piece in _pieces(rows)), min(WIDTHS)) if values.size else 8
        if bits not in WIDTHS or rows.shape[1] % MOST_CODES_IN_A_BYTE:
            self._store(tensor.name, UINT8, tensor.dims, _pieces(rows))
            return
        shift, parts = bits, []
        for width in WIDTHS[bits]:
            shift -= width
            last = len(WIDTHS[bits]) == 1
            parts.append(self._plane(tensor, rows, width, shift, tensor.name if last else None))
        if len(parts) > 1:
            self._make("BitwiseOr", parts, tensor.name)

    def _plane(self, tensor: Any, rows: Array, width: int, shift: int, name: str | None) -> str:
        """Store bits ``shift`` to ``shift + width`` of every code; gives the name of the value in the codes' shape."""
        count, inputs = rows.shape
        per, plane = 8 // width, f"{tensor.name}.plane{width}"
        packed = (pack_plane(piece, width, shift) for piece in _pieces(rows))
        self._store(plane, UINT8, (count, 1, inputs // per), packed)
        places = np.arange(0, 8, width, dtype=np.uint8).reshape(1, per, 1)
        spread = self._make("BitShift", [plane, self._constant(f"shifts{width}", places)], direction="RIGHT")
        mask = self._constant(f"mask{width}", np.array(2**width - 1, np.uint8))
        value = self._make("BitwiseAnd", [spread, mask])
        if shift:
            up = self._constant(f"shift{shift}", np.array(shift, np.uint8))
            value = self._make("BitShift", [value, up], direction="LEFT")
        shape = list(tensor.dims)
        target = self._constant(f"shape{'x'.join(map(str, shape))}", np.array(shape, np.int64))
        return self._make("Reshape", [value, target], name or f"{plane}/codes")

    def _constant(self, name: str, value: Array) -> str:
        """The name of a small constant in the graph file, which all nodes share."""
        from onnx import numpy_helper

        found = f"planes/{name}"
        if found not in self._shared:
            self._shared.add(found)
            self.tensors.append(numpy_helper.from_array(value, found))
        return found

    def _make(self, operator: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        made = output or f"{inputs[0]}/{operator}"
        self.nodes.append(helper.make_node(operator, inputs, [made], name=f"{made}/{operator}", **attributes))
        return made

    def _store(self, name: str, data_type: int, shape: Sequence[int], pieces: Any) -> None:
        self.tensors.append(self.data.tensor(name, data_type, shape, pieces))


def pack_plane(codes: Array, width: int, shift: int) -> Array:
    """Bits ``shift`` to ``shift + width`` of codes, uint8 [rows, inputs], as uint8 [rows, inputs * width / 8].

    The lowest bits of all bytes are the first ``inputs * width / 8`` codes, the next bits the codes behind those.
    """
    per = 8 // width
    parts = ((codes >> shift) & (2**width - 1)).reshape(len(codes), per, -1)
    packed = np.zeros((len(codes), parts.shape[2]), np.uint8)
    for place in range(per):
        packed |= parts[:, place] << (place * width)
    return packed


def _pieces(rows: Array) -> Iterator[Array]:
    """Some rows at a time."""
    step = max(PIECE // max(rows.shape[1], 1), 1)
    for begin in range(0, len(rows), step):
        yield rows[begin : begin + step]
