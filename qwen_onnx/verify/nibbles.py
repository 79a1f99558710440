"""Products with codes of 8 bits as sums of two with codes of 4, which ONNX Runtime multiplies much faster in float32.

At accuracy level 1 it has a kernel that multiplies one token with codes of 4 bits. Of 8 bits it has none: it makes the
whole matrix float32 anew for every token.
"""

from __future__ import annotations

import math
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_onnx.artifact.stored import UINT8, Array
from qwen_onnx.verify.graph import Graph, attributes

if TYPE_CHECKING:
    from onnx import NodeProto

# BitwiseAnd and BitwiseOr are of this version of ONNX's operators
LEAST_OPSET = 18
CODES, SCALES, ZEROS, BIAS = 1, 2, 3, 5
MIDDLE = 128  # zero point of 8 bits where a node has none
# bytes for each weight that ONNX Runtime holds until what is made of codes is loaded (2026-11-29: a head of 156 million
# weights), and how many it may hold: what is beyond stays, which takes time instead of memory
FOLDING, MOST_FOLDED = 7.2, 1_500_000_000


def in_nibbles(graph: Graph) -> None:
    """Replace MatMulNBits of 8 bits by two of 4: (16h + l - 16y - z)·s is (h - y)·16s + (l - z)·s.

    As many as ``MOST_FOLDED`` allows. The weights stay the same. What is made of codes follows from constants: ONNX
    Runtime computes it when it loads.

    Args:
        graph: computes in float32. Operators older than ``LEAST_OPSET`` and nodes whose zero points are no codes stay.
    """
    model = graph.model
    if max((item.version for item in model.opset_import if not item.domain), default=0) < LEAST_OPSET:
        return
    builder, left = _Builder(), MOST_FOLDED / FOLDING
    for node in model.graph.node:
        weights = _weights(node) if _has_bytes(graph, node) else math.inf
        if weights <= left:
            builder.split(node)
            left -= weights
        else:
            builder.nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(builder.nodes)
    model.graph.initializer.extend(builder.constants)


def _has_bytes(graph: Graph, node: NodeProto) -> bool:
    if node.op_type != "MatMulNBits" or attributes(node).get("bits", 4) != 8:
        return False
    return all(graph.kind(name) == UINT8 for name in (node.input[CODES], _given(node, ZEROS)) if name)


def _weights(node: NodeProto) -> int:
    told = attributes(node)
    return int(told["N"] * told["K"])


def _given(node: NodeProto, place: int) -> str:
    """The name of an input; empty if it is left out."""
    return node.input[place] if place < len(node.input) else ""


class _Builder:
    """Nodes in order, and the small constants that those of ours read."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[Any] = []
        self._numbers = count()

    def split(self, node: NodeProto) -> None:
        """Append what stands for a product."""
        told = attributes(node)
        rows, blocks = told["N"], -(-told["K"] // told["block_size"])
        high, low = self._halves(node.input[CODES], [rows, blocks, told["block_size"] // 2])
        shape = self._constant(np.array([rows, blocks]))
        given = _given(node, ZEROS)
        zeros = self._make("Reshape", given, shape) if given else self._filled(shape)
        # a row of codes of four bits begins with a byte of its own
        zeros = self._make("Concat", zeros, self._constant(np.zeros((rows, blocks % 2), np.uint8)), axis=1)
        high_zeros, low_zeros = self._halves(zeros, [rows, -(-blocks // 2)])
        scales = node.input[SCALES]
        larger = self._make("Mul", scales, self._constant(np.float32(16)))
        sides = [
            # a bias counts once
            self._product(node, [high, larger, high_zeros, _given(node, BIAS - 1), _given(node, BIAS)]),
            self._product(node, [low, scales, low_zeros, _given(node, BIAS - 1)]),
        ]
        self._make("Add", *sides, output=node.output[0])

    def _halves(self, codes: str, shape: list[int]) -> tuple[str, str]:
        """The high and the low halves of bytes, two in each byte of ``shape``, the first one in its low half."""
        pairs = self._make("Reshape", codes, self._constant(np.array([-1, 2])))
        even, odd = (self._make("Gather", pairs, self._constant(np.array(place)), axis=1) for place in (0, 1))
        four, low, high = (self._constant(np.uint8(value)) for value in (4, 0x0F, 0xF0))
        return (
            self._joined(self._shifted(even, four, "RIGHT"), self._make("BitwiseAnd", odd, high), shape),
            self._joined(self._make("BitwiseAnd", even, low), self._shifted(odd, four, "LEFT"), shape),
        )

    def _shifted(self, codes: str, bits: str, direction: str) -> str:
        return self._make("BitShift", codes, bits, direction=direction)

    def _joined(self, first: str, second: str, shape: list[int]) -> str:
        return self._make("Reshape", self._make("BitwiseOr", first, second), self._constant(np.array(shape)))

    def _product(self, node: NodeProto, inputs: list[str]) -> str:
        while not inputs[-1]:
            inputs.pop()
        told = {**attributes(node), "bits": 4}
        return self._make("MatMulNBits", node.input[0], *inputs, domain="com.microsoft", **told)

    def _filled(self, shape: str) -> str:
        from onnx import numpy_helper

        return self._make("ConstantOfShape", shape, value=numpy_helper.from_array(np.array([MIDDLE], np.uint8)))

    def _make(self, kind: str, *inputs: str, output: str = "", **told: Any) -> str:
        from onnx import helper

        output = output or f"nibbles/{next(self._numbers)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], f"{output}/{kind}", **told))
        return output

    def _constant(self, value: Array | np.generic) -> str:
        from onnx import numpy_helper

        name = f"nibbles/{next(self._numbers)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name
