"""One description of a graph, written twice: in float to be calibrated, and in QDQ form for the HTP.

Every tensor has a *range key* or is float. Tensors that hold the same numbers in another shape share a key, so that
reshaping, slicing and the KV cache never requantise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, ValueInfoProto, helper

from qwen_onnx.artifact.htp.grid import Grid
from qwen_onnx.export.passes.htp_qdq.linears import Linear

OPSET = 23  # the first with RMSNormalization
IR_VERSION = 11
ALIGNMENT = 64
TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.uint16): TensorProto.UINT16,
    np.dtype(np.int8): TensorProto.INT8,
}
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Value:
    """What a node reads: the tensor, and the key of its range (None: a float that is never quantised)."""

    name: str
    key: str | None


class DataFile:
    """External data of one or several ONNX files; a tensor of a known name is stored once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        path.write_bytes(b"")

    def tensor(self, name: str, kind: int, shape: Sequence[int], data: bytes) -> TensorProto:
        """The initializer ``name`` whose bytes are in the file."""
        if name not in self._places:
            with self.path.open("ab") as file:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                self._places[name] = (file.tell(), len(data))
                file.write(data)
        offset, length = self._places[name]
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class Writer(ABC):
    """Collects nodes; what a tensor with a key becomes is the subclass's business."""

    def __init__(self, data: DataFile) -> None:
        self.data = data
        self.nodes: list[Any] = []
        self.tensors: dict[str, TensorProto] = {}
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []

    def compute(self, kind: str, inputs: Sequence[Value | str], key: str, **attributes: Any) -> Value:
        """A node whose result has a range of its own, ``key``, which also names the tensor."""
        return self._ranged(kind, inputs, key, key, attributes)

    def move(self, kind: str, inputs: Sequence[Value | str], name: str, **attributes: Any) -> Value:
        """A node that only moves numbers: its result has the range of its first input."""
        first = inputs[0]
        assert isinstance(first, Value)
        assert first.key
        return self._ranged(kind, inputs, name, first.key, attributes)

    def floating(self, kind: str, inputs: Sequence[Value | str], name: str, **attributes: Any) -> Value:
        """A node whose result stays a float."""
        self.node(kind, inputs, name, **attributes)
        return Value(name, None)

    def node(self, kind: str, inputs: Sequence[Value | str], output: str, **attributes: Any) -> None:
        """Any node; it has the name of its output."""
        names = [value.name if isinstance(value, Value) else value for value in inputs]
        self.nodes.append(helper.make_node(kind, names, [output], name=output, **attributes))

    def exact(self, name: str, array: Array) -> str:
        """A constant that is not quantised."""
        kind = TYPES[array.dtype]
        if name not in self.tensors:
            # shapes and axes are read while the graph is optimised: in the graph itself, not outside
            small = array.dtype == np.int64
            self.tensors[name] = (
                helper.make_tensor(name, kind, array.shape, array.flatten())
                if small
                else self.data.tensor(name, kind, array.shape, np.ascontiguousarray(array).tobytes())
            )
        return name

    def model(self) -> Any:
        """The ONNX model of everything that was written."""
        graph = helper.make_graph(self.nodes, "decoder", self.inputs, self.outputs, list(self.tensors.values()))
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)

    @abstractmethod
    def _ranged(
        self, kind: str, inputs: Sequence[Value | str], name: str, key: str, attributes: dict[str, Any]
    ) -> Value: ...

    @abstractmethod
    def input(self, name: str, shape: Sequence[int], key: str) -> Value:
        """A graph input."""

    @abstractmethod
    def output(self, value: Value, name: str, shape: Sequence[int]) -> None:
        """Make ``value``, the result of the node ``name``, a graph output."""

    @abstractmethod
    def constant(self, name: str, array: Array) -> Value:
        """A float constant, on the grid of its own range."""

    @abstractmethod
    def weights(self, linear: Linear) -> str:
        """The matrix [in, out] that a MatMul reads."""


class FloatWriter(Writer):
    """The graph in float32, with the least and greatest number of every key as further outputs."""

    def __init__(self, data: DataFile, *, ranges: bool = True) -> None:
        super().__init__(data)
        self._ranges = ranges

    def input(self, name: str, shape: Sequence[int], key: str) -> Value:
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return Value(name, key)

    def output(self, value: Value, name: str, shape: Sequence[int]) -> None:
        self.outputs.append(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))

    def constant(self, name: str, array: Array) -> Value:
        return Value(self.exact(name, array.astype(np.float32)), name)

    def weights(self, linear: Linear) -> str:
        return self.exact(linear.name, np.ascontiguousarray(linear.dense().T))

    def _ranged(
        self, kind: str, inputs: Sequence[Value | str], name: str, key: str, attributes: dict[str, Any]
    ) -> Value:
        self.node(kind, inputs, name, **attributes)
        if self._ranges and name == key:
            for reduce in ("ReduceMin", "ReduceMax"):
                self.node(reduce, [name], f"{reduce}:{key}", keepdims=0)
                self.outputs.append(helper.make_tensor_value_info(f"{reduce}:{key}", TensorProto.FLOAT, []))
        return Value(name, key)


class QdqWriter(Writer):
    """The graph with every key on its 16-bit grid, integer weights, and 16-bit inputs and outputs.

    Args:
        grids: of every key but constants.
    """

    def __init__(self, data: DataFile, grids: dict[str, Grid]) -> None:
        super().__init__(data)
        self.grids = dict(grids)

    def input(self, name: str, shape: Sequence[int], key: str) -> Value:
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.UINT16, shape))
        return self._dequantized(name, key)

    def output(self, value: Value, name: str, shape: Sequence[int]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.UINT16, shape))

    def constant(self, name: str, array: Array) -> Value:
        self.grids[name] = grid = Grid.spanning(float(array.min()), float(array.max()))
        self.exact(name, grid.quantize(array.astype(np.float32)))
        return self._dequantized(name, name)

    def weights(self, linear: Linear) -> str:
        name, (codes, scales) = linear.name, linear.integers()
        kind = TensorProto.INT4 if linear.bits == 4 else TensorProto.INT8
        packed = np.ascontiguousarray(codes.T).reshape(-1)
        if linear.bits == 4:
            packed = np.append(packed, np.zeros(len(packed) % 2, np.int8)).view(np.uint8) & 15
            packed = packed[::2] | packed[1::2] << 4
        self.tensors[name] = self.data.tensor(name, kind, codes.T.shape, packed.tobytes())
        self.exact(f"{name}.scale", scales.astype(np.float32))
        zero = f"{name}.zero_point"
        self.tensors[zero] = helper.make_tensor(zero, kind, scales.shape, np.zeros(scales.shape, np.int8))
        self.node("DequantizeLinear", [name, f"{name}.scale", zero], f"{name}.dequantized", axis=1)
        return f"{name}.dequantized"

    def _ranged(
        self, kind: str, inputs: Sequence[Value | str], name: str, key: str, attributes: dict[str, Any]
    ) -> Value:
        self.node(kind, inputs, f"{name}.float", **attributes)
        self.node("QuantizeLinear", [f"{name}.float", *self._grid(key)], name)
        return self._dequantized(name, key)

    def _dequantized(self, name: str, key: str) -> Value:
        self.node("DequantizeLinear", [name, *self._grid(key)], f"{name}.dequantized")
        return Value(f"{name}.dequantized", key)

    def _grid(self, key: str) -> tuple[str, str]:
        grid, scale, zero = self.grids[key], f"{key}.scale", f"{key}.zero_point"
        self.tensors[scale] = helper.make_tensor(scale, TensorProto.FLOAT, [], [grid.scale])
        self.tensors[zero] = helper.make_tensor(zero, TensorProto.UINT16, [], [grid.zero])
        return scale, zero
