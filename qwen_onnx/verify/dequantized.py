"""The matrices of a quantised graph by their names in transformers, to be put in place of the checkpoint's.

What is not quantised, biases, norms, routers, convolutions, is not taken from the graph: it stays the checkpoint's, so
that a graph which lost or changed one of them computes something else than PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from qwen_onnx.errors import VerificationError
from qwen_onnx.export.experts import STACKED
from qwen_onnx.export.skeleton import EMBEDDING, HEAD
from qwen_onnx.verify.graph import Graph, attributes
from qwen_onnx.verify.matrices import ExpertMatrices, Made, Matrix, Packed, Part, Picked, StreamedLinear

# a matrix in genai's graph → its modules in transformers, in the order of their rows; those that a layer has count
MODULES = {
    "attn/qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn/q_proj": ("self_attn.q_proj",),
    "attn/k_proj": ("self_attn.k_proj",),
    "attn/v_proj": ("self_attn.v_proj",),
    "attn/o_proj": ("self_attn.o_proj",),
    "linear_attn/qkv_proj": ("linear_attn.in_proj_qkv",),
    "linear_attn/z_proj": ("linear_attn.in_proj_z",),
    "linear_attn/out_proj": ("linear_attn.out_proj",),
    "mlp/gate_proj": ("mlp.gate_proj", "mlp.shared_expert.gate_proj"),
    "mlp/up_proj": ("mlp.up_proj", "mlp.shared_expert.up_proj"),
    "mlp/down_proj": ("mlp.down_proj", "mlp.shared_expert.down_proj"),
}
PLACE = re.compile(r"/layers\.(\d+)/(.+)/[^/]+$")
GROUPED = "linear_attn.in_proj_qkvz"
ZERO_POINTS = 11  # input of QMoE, of the first matrix; the second's come next


class Dequantized:
    """The quantised matrices of a graph.

    Attributes:
        matrices: by the name of the parameter that they stand for, ``model.layers.0.self_attn.q_proj.weight``.
        experts: likewise, ``model.layers.0.mlp.experts.down_proj``.

    Args:
        graph: of an artifact.
        layers: modules of each decoder layer by name, linear ones as ``StreamedLinear``.
        config: of the text model.

    Raises:
        VerificationError: the graph has a matrix that the architecture has not, or of another size.
    """

    def __init__(self, graph: Graph, layers: Sequence[Mapping[str, torch.nn.Module]], config: Any) -> None:
        self.graph, self._layers, self._config = graph, layers, config
        self.matrices: dict[str, Matrix] = {}
        self.experts: dict[str, ExpertMatrices] = {}
        grouped: dict[int, dict[str, Matrix]] = {}
        for node in graph.nodes:
            if node.op_type == "GatherBlockQuantized":
                self.matrices[EMBEDDING] = self._table(node)
            elif node.op_type == "QMoE":
                self._take_experts(node)
            elif node.op_type == "MatMulNBits":
                self._take(node.name, self._packed(node), grouped)
            elif node.op_type == "DequantizeLinear":
                # called after the MatMul that it serves
                self._take(node.name.removesuffix("/DequantizeLinear"), self._signed(node), grouped)
        for index, parts in grouped.items():
            self.matrices[f"model.layers.{index}.{GROUPED}.weight"] = self._regrouped(parts)

    def _fault(self, what: str) -> VerificationError:
        return VerificationError(f"the graph is not that of its architecture: {what}", where=str(self.graph.file))

    def _tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.graph.tensor(name))

    def _packed(self, node: Any) -> Matrix:
        found = attributes(node)
        return self._made(node.input[1:4], (found["N"], found["K"]), partial(self._read, node.input[1:4], found))

    def _made(self, names: Sequence[str], shape: tuple[int, int], read: Callable[[], Packed]) -> Matrix:
        """A matrix that is read now, since it is only mapped, or later, where the graph computes a part of it."""
        if not any(name in self.graph.folded for name in names):
            return read()
        # type and shape of every part are known without reading one; what is not there should not wait until then
        rows = self.graph.folded.kind(names[0]).shape[0]
        if rows != shape[0]:
            raise self._fault(f"{names[0]} has {rows} rows, not {shape[0]}")
        return Made(shape, read)

    def _read(self, names: Sequence[str], found: Mapping[str, Any]) -> Packed:
        codes, scales = self._tensor(names[0]), self._tensor(names[1])
        zeros = self._tensor(names[2]) if len(names) > 2 and names[2] else None
        rows = found["N"]
        return Packed(codes.reshape(rows, -1), scales.reshape(rows, -1), zeros, found["bits"], found["K"])

    def _signed(self, node: Any) -> Packed:
        """In QDQ form: INT4 [outputs, inputs] with scales of blocks of inputs and no zero points."""
        if attributes(node).get("axis", 1) not in (1, -1) or len(node.input) > 2:
            raise self._fault(f"{node.name} has its weights in another form")
        codes, scales = self._tensor(node.input[0]), self._tensor(node.input[1])
        return Packed(codes, scales, None, 4, 2 * codes.shape[1], signed=True)

    def _table(self, node: Any) -> Matrix:
        # a table that is the head's goes through a Reshape
        reshaped = {item.output[0]: item.input[0] for item in self.graph.nodes if item.op_type == "Reshape"}
        names = [reshaped.get(node.input[0], node.input[0]), *node.input[2:4]]
        rows, width = self.graph.folded.kind(names[0]).shape[0], self._config.hidden_size
        found = {"N": rows, "K": width, "bits": attributes(node).get("bits", 4)}
        return self._made(names, (rows, width), partial(self._read, names, found))

    def _take(self, node: str, matrix: Matrix, grouped: dict[int, dict[str, Matrix]]) -> None:
        """Put the matrix of a node in the place of its modules."""
        if "/lm_head/" in node:
            self.matrices[HEAD] = matrix
            return
        place = PLACE.search(node)
        if place is None or int(place[1]) >= len(self._layers) or place[2] not in MODULES:
            raise self._fault(f"unknown matrix {node}")
        index, modules = int(place[1]), self._layers[int(place[1])]
        if GROUPED in modules and place[2] in ("linear_attn/qkv_proj", "linear_attn/z_proj"):
            grouped.setdefault(index, {})[place[2]] = matrix
            return
        begin = 0
        for name in MODULES[place[2]]:
            module = modules.get(name)
            if isinstance(module, StreamedLinear):
                self.matrices[f"model.layers.{index}.{name}.weight"] = Part(matrix, begin, module.shape[0])
                begin += module.shape[0]
        if begin != matrix.shape[0]:
            raise self._fault(f"{node} has {matrix.shape[0]} rows, its architecture {begin}")

    def _regrouped(self, parts: dict[str, Matrix]) -> Matrix:
        """Qwen3-Next keeps query, key, value and gate of a key head together; the graph has all queries first."""
        if len(parts) != 2:
            raise self._fault(f"{GROUPED} is there in part")
        stack = [parts["linear_attn/qkv_proj"], parts["linear_attn/z_proj"]]
        heads, config = self._config.linear_num_key_heads, self._config
        narrow = config.linear_key_head_dim
        wide = config.linear_num_value_heads // heads * config.linear_value_head_dim
        begins = [0]
        for size in (narrow, narrow, wide, wide):
            begins.append(begins[-1] + heads * size)
        if begins[-1] != stack[0].shape[0] + stack[1].shape[0]:
            raise self._fault(f"{GROUPED} has {begins[-1]} rows")
        rows = [
            begin + head * size + torch.arange(size)
            for head in range(heads)
            for begin, size in zip(begins, (narrow, narrow, wide, wide), strict=False)
        ]
        return Picked(stack, torch.cat(rows))

    def _take_experts(self, node: Any) -> None:
        """Both matrices of every expert; the operator wants the rows of gate and up in turns."""
        place = PLACE.search(node.name)
        if place is None:
            raise self._fault(f"unknown experts {node.name}")
        found, bits = attributes(node), attributes(node).get("expert_weight_bits", 4)
        prefix = f"model.layers.{place[1]}.mlp.experts"
        for number, name in enumerate(STACKED):
            codes, scales = (self._tensor(node.input[2 + 3 * number + part]) for part in (0, 1))
            named = node.input[ZERO_POINTS + number] if len(node.input) > ZERO_POINTS + number else ""
            zeros = self._tensor(named) if named else None
            columns, rows = codes.shape[-1] * 8 // bits, codes.shape[1]
            order = torch.cat([torch.arange(0, rows, 2), torch.arange(1, rows, 2)])
            experts: list[list[Matrix]] = []
            for expert in range(len(codes)):
                middle = None if zeros is None else zeros[expert]
                matrix: Matrix = Packed(codes[expert], scales[expert].reshape(rows, -1), middle, bits, columns)
                experts.append([Picked([matrix], order) if name == "gate_up_proj" else matrix])
            self.experts[f"{prefix}.{name}"] = ExpertMatrices(experts)
        if found.get("swiglu_fusion", 1) != 1:
            raise self._fault(f"{node.name} does not take the rows of gate and up in turns")
