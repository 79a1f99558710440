"""Values that a graph computes from its constants alone, as ONNX Runtime folds them when it loads.

Codes stored in planes of bits and scales stored in half precision are such values. Whoever reads weights by their names
sees through them here; they are made one at a time, by ONNX's reference implementation of the operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_onnx.artifact.stored import FLOAT, FLOAT16, INT64, TYPES, UINT8, Array, is_external
from qwen_onnx.errors import QwenOnnxError

BITWISE = ("BitShift", "BitwiseAnd", "BitwiseOr")
SHAPING = ("Reshape", "Expand")
OPERATORS = (*BITWISE, "Cast", *SHAPING)
# a stranger may have written the graph: ours need 15 nodes for a value, 3 dimensions and, of planes of one bit, 8
# times as many codes as there are bytes
MOST_NODES, MOST_DIMENSIONS, MOST_GROWTH = 16, 8, 8


@dataclass(frozen=True)
class Kind:
    """Element type (onnx.TensorProto.DataType) and shape of a value."""

    data_type: int
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """In memory.

        Raises:
            KeyError: it is not of a type that weights have.
        """
        width: int = np.dtype(TYPES[self.data_type]).itemsize
        return self.count * width


class Folded:
    """The constant expressions of a graph, by the name of their value; ``name in folded`` tells whether it is one.

    An expression consists of ``OPERATORS`` over initialisers. A ``Reshape`` or ``Expand`` counts where its target is in
    the graph file itself, so that type and shape are known before any weight is read.

    Args:
        model: loaded without its external data; nodes that are put in later are not seen.
        file: that it was loaded from, for messages.
        error: class of the errors.
    """

    def __init__(self, model: Any, file: Path, error: type[QwenOnnxError]) -> None:
        self.file, self.error = file, error
        self._opsets = list(model.opset_import)
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        # by name: place in the graph and node, which ONNX has behind all that it reads
        self._makers: dict[str, tuple[int, Any]] = {}
        for place, node in enumerate(model.graph.node):
            if self._is_folded(node):
                self._makers[node.output[0]] = place, node

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def _is_folded(self, node: Any) -> bool:
        if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx") or not node.input or not node.output:
            return False
        if not all(name in self._stored or name in self._makers for name in node.input):
            return False
        return node.op_type not in SHAPING or self._target(node) is not None

    def _target(self, node: Any) -> list[int] | None:
        """What a Reshape or Expand asks for, if it stands in the graph file."""
        tensor = self._stored.get(node.input[1]) if len(node.input) == 2 else None
        small = tensor is not None and len(tensor.dims) == 1 and tensor.dims[0] <= MOST_DIMENSIONS
        if tensor is None or not small or tensor.data_type != INT64 or is_external(tensor):
            return None
        try:
            return [int(size) for size in _inline(tensor)]
        except ValueError:
            # as many bytes as the shape says are not there
            return None

    def _fault(self, name: str, what: str) -> QwenOnnxError:
        return self.error(f"{name} cannot be read: {what}", where=str(self.file))

    def _steps(self, name: str) -> list[Any]:
        """The nodes that a value is made by, in order."""
        found: dict[str, tuple[int, Any]] = {}
        pending = [name]
        while pending:
            current = pending.pop()
            if current in found or current not in self._makers:
                continue
            if len(found) == MOST_NODES:
                raise self._fault(name, f"it is made by more than {MOST_NODES} operators")
            found[current] = self._makers[current]
            pending += self._makers[current][1].input
        return [node for _, node in sorted(found.values(), key=lambda item: item[0])]

    def sources(self, name: str) -> list[Any]:
        """The initialisers (onnx.TensorProto) that a value is made of, or that it is.

        Raises:
            error: there is no such value, or it is no expression of ours.
        """
        if name in self._stored:
            return [self._stored[name]]
        if name not in self._makers:
            raise self._fault(name, "it is not a constant")
        names = dict.fromkeys(item for node in self._steps(name) for item in node.input)
        return [self._stored[item] for item in names if item in self._stored]

    def kind(self, name: str) -> Kind:
        """Type and shape of a value, or of an initialiser; nothing is read.

        Raises:
            error: as ``sources``.
        """
        kinds = {tensor.name: _kind_of(tensor) for tensor in self.sources(name)}
        if name in kinds:
            return kinds[name]
        most = MOST_GROWTH * max(kind.count for kind in kinds.values())
        for node in self._steps(name):
            found = self._result(name, node, [kinds[item] for item in node.input])
            if found.count > most:
                raise self._fault(name, f"it is more than {MOST_GROWTH} times as large as what it is made of")
            kinds[node.output[0]] = found
        return kinds[name]

    def _result(self, name: str, node: Any, inputs: list[Kind]) -> Kind:
        """Of one operator."""
        if node.op_type == "Cast":
            target = next((item.i for item in node.attribute if item.name == "to"), None)
            if target not in (FLOAT, FLOAT16) or inputs[0].data_type not in (FLOAT, FLOAT16):
                raise self._fault(name, "it casts something else than float32 and float16")
            return Kind(target, inputs[0].shape)
        if node.op_type == "Reshape":
            target = tuple(self._target(node) or ())
            if math.prod(target) != inputs[0].count or any(size < 0 for size in target):
                raise self._fault(name, f"{list(inputs[0].shape)} does not fit into {list(target)}")
            return Kind(inputs[0].data_type, target)
        if node.op_type == "Expand":
            return Kind(inputs[0].data_type, self._broadcast(name, inputs[0].shape, tuple(self._target(node) or ())))
        if len(inputs) != 2 or any(item.data_type != UINT8 for item in inputs):
            raise self._fault(name, f"{node.op_type} wants two inputs of uint8")
        return Kind(UINT8, self._broadcast(name, *(item.shape for item in inputs)))

    def _broadcast(self, name: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        try:
            return np.broadcast_shapes(*shapes)
        except ValueError as cause:
            raise self._fault(name, str(cause)) from cause

    def value(self, name: str, read: Callable[[str], Array]) -> Array:
        """A value, computed one operator after the other; at most three of its size are in memory.

        Args:
            read: gives an initialiser that is not in the graph file itself.

        Raises:
            error: as ``sources``.
        """
        from onnx.reference import ReferenceEvaluator

        wanted, steps = self.kind(name), self._steps(name)
        values: dict[str, Array] = {}
        for place, node in enumerate(steps):
            for item in node.input:
                if item in self._stored and is_external(self._stored[item]):
                    values[item] = read(item)
            try:
                values |= {item: _inline(self._stored[item]) for item in node.input if item not in values}
                made: Any = ReferenceEvaluator(self._alone(node)).run(None, {item: values[item] for item in node.input})
            except (ValueError, TypeError, RuntimeError) as cause:
                raise self._fault(name, f"{node.op_type}: {cause}") from cause
            values[node.output[0]] = made[0]
            values = _kept(values, {item for later in steps[place + 1 :] for item in later.input} | {name})
        found = values[name]
        assert found.shape == wanted.shape, f"{name}: {found.shape} is not {wanted.shape}"
        return found

    def _alone(self, node: Any) -> Any:
        from onnx import TensorProto, helper

        # types of inputs and outputs do not matter to the evaluator
        given, made = (
            [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in dict.fromkeys(names)]
            for names in (node.input, node.output)
        )
        return helper.make_model(helper.make_graph([node], "one", given, made), opset_imports=self._opsets)


def _kept(values: dict[str, Array], names: Iterable[str]) -> dict[str, Array]:
    return {name: values[name] for name in names if name in values}


def _kind_of(tensor: Any) -> Kind:
    return Kind(tensor.data_type, tuple(tensor.dims))


def _inline(tensor: Any) -> Array:
    from onnx import numpy_helper

    found: Array = numpy_helper.to_array(tensor)
    return found
