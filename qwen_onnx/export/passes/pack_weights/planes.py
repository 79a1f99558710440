"""What becomes of a constant: planes of bits or half precision, and the nodes that make it again under its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_onnx.artifact.stored import FLOAT, FLOAT16, UINT8, Array, is_external, mapped_bytes
from qwen_onnx.errors import ExportError
from qwen_onnx.export.passes.pack_weights.data_file import DataFile
from qwen_onnx.export.passes.pack_weights.options import PIECE, WIDTHS

# codes of a plane of one bit in a byte: rows that it does not divide stay as they are
MOST_CODES_IN_A_BYTE = 8
# blocks in a row that are looked at for one scale and one zero point, the most first
SHARED = (4, 2)


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
        """float32 of any shape: in half precision where that is exact, else as they are; those that repeat once."""
        # beyond the range they become infinite, which is not exact
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.array_equal(halves.astype(np.float32), values):
            self._store(tensor.name, FLOAT, tensor.dims, [values])
            return
        stored, run = f"{tensor.name}.half", run_of(values)
        if run == 1:
            self._store(stored, FLOAT16, tensor.dims, [halves])
            self._make("Cast", [stored], tensor.name, to=FLOAT)
            return
        once = halves.reshape(-1, run)[:, :1]
        self._store(stored, FLOAT16, once.shape, [once])
        self._repeat(self._make("Cast", [stored], to=FLOAT), run, tensor)

    def codes(self, tensor: Any, values: Array) -> None:
        """uint8 of any shape: in planes if all are below 2**7 and rows divide into bytes, else as they are.

        What has no dimension for the inputs, as zero points have none, is one row; what repeats there is stored once.
        """
        run = run_of(values) if values.ndim < 3 else 1
        rows = values.reshape(-1, run)[:, :1].reshape(1, -1) if values.ndim < 3 else values.reshape(len(values), -1)
        name, shape = (tensor.name, list(tensor.dims)) if run == 1 else (f"{tensor.name}.once", [rows.size, 1])
        bits = max(*(int(piece.max()).bit_length() for piece in _pieces(rows)), min(WIDTHS)) if values.size else 8
        if bits in WIDTHS and rows.shape[1] % MOST_CODES_IN_A_BYTE == 0:
            self._planes(name, rows, bits, shape)
        else:
            self._store(name, UINT8, shape, _pieces(rows))
        if run > 1:
            self._repeat(name, run, tensor)

    def _planes(self, name: str, rows: Array, bits: int, shape: list[int]) -> None:
        """Store codes below 2**``bits``; the value ``name`` has them in ``shape``."""
        shift, parts = bits, []
        for width in WIDTHS[bits]:
            shift -= width
            part = self._plane(f"{name}.plane{width}", rows, width, shift)
            parts.append(self._reshape(part, shape, name if width == bits else None))
        value = parts[0]
        for part in parts[1:]:
            value = self._make("BitwiseOr", [value, part], name if part == parts[-1] else None)

    def _plane(self, plane: str, rows: Array, width: int, shift: int) -> str:
        """Store bits ``shift`` to ``shift + width`` of every code; gives the name of what has them in place."""
        count, inputs = rows.shape
        per = 8 // width
        packed = (pack_plane(piece, width, shift) for piece in _pieces(rows))
        self._store(plane, UINT8, (count, 1, inputs // per), packed)
        places = np.arange(0, 8, width, dtype=np.uint8).reshape(1, per, 1)
        spread = self._make("BitShift", [plane, self._constant(f"shifts{width}", places)], direction="RIGHT")
        mask = self._constant(f"mask{width}", np.array(2**width - 1, np.uint8))
        value = self._make("BitwiseAnd", [spread, mask])
        if shift:
            up = self._constant(f"shift{shift}", np.array(shift, np.uint8))
            value = self._make("BitShift", [value, up], direction="LEFT")
        return value

    def _repeat(self, value: str, run: int, tensor: Any) -> None:
        """``tensor`` is every element of ``value``, [elements, 1], ``run`` times."""
        times = self._constant(f"times{run}", np.array([1, run], np.int64))
        self._reshape(self._make("Expand", [value, times]), tensor.dims, tensor.name)

    def _reshape(self, value: str, shape: Sequence[int], output: str | None = None) -> str:
        target = self._constant(f"shape{'x'.join(map(str, shape))}", np.array(shape, np.int64))
        return self._make("Reshape", [value, target], output)

    def _constant(self, name: str, value: Array) -> str:
        """The name of a small constant in the graph file, which all nodes share."""
        from onnx import numpy_helper

        found = f"planes/{name}"
        if found not in self._shared:
            self._shared.add(found)
            self.tensors.append(numpy_helper.from_array(value, found))
        return found

    def _make(self, operator: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """Add a node; gives the name of what it makes, a short one in between: thousands of them are in the file."""
        from onnx import helper

        made = output or f"planes/{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [made], **attributes))
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


def run_of(values: Array) -> int:
    """How many elements in a row are always the same, as where blocks share a scale: 4, 2 or 1."""
    flat = values.reshape(-1)
    for run in SHARED:
        if flat.size and flat.size % run == 0:
            runs = flat.reshape(-1, run)
            if np.array_equal(runs, np.broadcast_to(runs[:, :1], runs.shape)):
                return run
    return 1


def _pieces(rows: Array) -> Iterator[Array]:
    """Some rows at a time."""
    step = max(PIECE // max(rows.shape[1], 1), 1)
    for begin in range(0, len(rows), step):
        yield rows[begin : begin + step]
