"""Quantising inside genai's builder in steps that are kept: the experts, then the other matrices, layer by layer.

A finished layer is a few files in a ``WorkFolder``; a build that was killed goes on behind the last of them. The
quantisers are genai's own, so the bytes are those of the stock builder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qwen_onnx.export.experts import StoredExperts, Triple, zero_points_of
from qwen_onnx.export.passes.genai_builder.options import MATRIX_PIECE
from qwen_onnx.export.progress import Steps
from qwen_onnx.export.weights import create_safetensors, mapped_safetensors
from qwen_onnx.export.workfolder import WorkFolder
from qwen_onnx.processes.memory import return_free_memory

QUANTIZED = ("MatMul", "Gather")
LAYER = re.compile(r"/model/layers\.(\d+)/")
# what the builder's quantiser of experts notes for the operator's attributes, and what the operator reads
BLOCK, BITS = "block_size", "expert_weight_bits"


class ExpertSteps:
    """Packs the experts of each layer for the operators MoE and QMoE, one expert in memory at a time."""

    def __init__(self, work: WorkFolder) -> None:
        self.work = work
        self.steps: Steps | None = None

    def make(self, builder: Any, layer: int, stored: StoredExperts) -> None:
        """Register a layer's initializers with genai's ``builder``: codes and scales, or weights in its own type."""
        if self.steps is None:
            self.steps = Steps("packed the experts of layer", builder.num_layers)
        step = f"experts-{layer:04d}"
        file, names = f"{step}.safetensors", builder.make_moe_expert_names(layer)
        facts = self.work.finished(step)
        if facts is None:
            self._write(builder, stored, file)
            facts = {name: builder.moe_attrs.get(name) for name in (BLOCK, BITS)}
            self.work.commit(step, [file], facts)
            return_free_memory()
            self.steps.step(layer + 1)
        # quantising sets it, for whole channels it takes it away
        builder.moe_attrs.pop(BLOCK, None)
        builder.moe_attrs |= {name: value for name, value in facts.items() if value is not None}
        found = mapped_safetensors(self.work.path / file)
        for part in ("gate_up_weight", "down_weight"):
            builder.make_initializer(found[part], names[part])
        for part in ("gate_up_scales", "down_scales"):
            if part in found:
                builder.make_initializer(found[part], names[part], to=builder.io_dtype)
        for part in ("gate_up_zeros", "down_zeros"):
            if part in found:
                builder.make_initializer(found[part], zero_points_of(names[part.replace("zeros", "weight")]))

    def _write(self, builder: Any, stored: StoredExperts, file: str) -> None:
        rows: dict[str, torch.Tensor] = {}
        if stored.quantized:
            each = (_coded(builder, *pair) for pair in stored.codes())
        else:
            each = (_packed(builder, *pair) for pair in stored.matrices())
        for index, packed in enumerate(each):
            if not rows:
                layout = {name: (part.dtype, (stored.count, *part.shape)) for name, part in packed.items()}
                rows = create_safetensors(self.work.temporary(file), layout)
            for name, part in packed.items():
                rows[name][index] = part


def _packed(builder: Any, gate_up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    """One expert as the operator takes it, by genai's own quantiser (its ``make_moe_expert_initializers``)."""
    if builder.moe_attrs["op_type"] == "MoE":
        dtype = TORCH_TYPES[builder.io_dtype]
        return {"gate_up_weight": gate_up.to(dtype), "down_weight": down.to(dtype)}
    one, one_scales = builder.make_qmoe_weights(gate_up, builder.moe_attrs.get("fc1_expert_weight_bits"))
    two, two_scales = builder.make_qmoe_weights(down, builder.moe_attrs.get("fc2_expert_weight_bits"))
    return {
        "gate_up_weight": one.to(torch.uint8),
        "gate_up_scales": one_scales,
        "down_weight": two.to(torch.uint8),
        "down_scales": two_scales,
    }


def _coded(builder: Any, gate_up: Triple, down: Triple) -> dict[str, torch.Tensor]:
    """One expert that came in codes, which stay as they are."""
    (one, one_scales, one_zeros), (two, two_scales, two_zeros) = gate_up, down
    inputs = len(two)
    builder.moe_attrs |= {BLOCK: inputs // one_scales.shape[1], BITS: 8 * one.shape[1] // inputs}
    return {
        "gate_up_weight": one,
        "gate_up_scales": one_scales,
        "gate_up_zeros": one_zeros,
        "down_weight": two,
        "down_scales": two_scales,
        "down_zeros": two_zeros,
    }


TORCH_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}


def quantize_matrices(builder: Any, to_nbits: Callable[[Any], Any], work: WorkFolder) -> Any:
    """genai's ``to_nbits`` on graphs of one node each, put back into the whole graph."""
    whole = builder.model
    if getattr(builder, "exact_quant_override_names", None):
        # it checks that every name is in the graph: not for graphs of one node, and no recipe can ask for it
        return to_nbits(builder)
    groups = _groups(builder)
    steps = Steps("quantised the matrices of part", len(groups))
    for number, (group, nodes) in enumerate(groups.items(), 1):
        step = f"matrices-{group}"
        if work.finished(step) is None:
            files = [name for node in nodes for name in _quantized(builder, node, to_nbits, work)]
            work.commit(step, list(dict.fromkeys(files)))
            return_free_memory()
            steps.step(number)
        for node in nodes:
            weight = _weight(node)
            found = ir.load(work.path / _file(node))
            whole.graph.opset_imports.update(found.graph.opset_imports)
            _put_back(whole.graph, node, found.graph)
            if not weight.uses():
                del whole.graph.initializers[weight.name]
    return whole


def _groups(builder: Any) -> dict[str, list[Any]]:
    """The nodes that are quantised: those of each layer together, then what is outside of them."""
    groups: dict[str, list[Any]] = {}
    outer: list[Any] = []
    for node in builder.model.graph:
        if node.op_type not in builder.quant_attrs["op_types_to_quantize"] or node.op_type not in QUANTIZED:
            continue
        weight = _weight(node)
        if weight is None or weight.const_value is None or node.name in builder.quant_attrs["nodes_to_exclude"]:
            continue
        layer = LAYER.match(node.name)
        (groups.setdefault(f"{int(layer[1]):04d}", []) if layer else outer).append(node)
    return groups | ({"outer": outer} if outer else {})


def _weight(node: Any) -> Any:
    return node.inputs[0 if node.op_type == "Gather" else 1]


def _file(node: Any) -> str:
    """Name of the file that holds what became of a node."""
    return f"{node.name.strip('/').replace('/', '.')}.onnx"


def _quantized(builder: Any, node: Any, to_nbits: Callable[[Any], Any], work: WorkFolder) -> Iterator[str]:
    """Quantise one node; writes its graph and the larger weights beside it, and yields the files' names.

    Every row of a result belongs to one output of the matrix (or one row of an embedding), whatever the method: the
    results of its pieces, one after the other, are the result of the whole.
    """
    given = {value.name for value in node.inputs}
    begun: dict[str, int] = {}
    for weight in _pieces(builder, node):
        found = _to_nbits(builder, to_nbits, _alone(node, builder.model, weight))
        results = {name: value for name, value in found.graph.initializers.items() if name not in given}
        for name, value in results.items():
            file, tensor = f"{name.replace('/', '.')}.raw", value.const_value
            path = work.temporary(file) if name not in begun else work.path / f"{file}.part"
            with path.open("ab") as out:
                tensor.tofile(out)
            begun[name] = begun.get(name, 0) + tensor.shape[0]
            value.shape = ir.Shape([begun[name], *tensor.shape[1:]])
            value.const_value = external(tensor, work.path / file, value.shape)
    for name in given & set(found.graph.initializers):
        # the whole graph has it
        value = found.graph.initializers.pop(name)
        value.const_value = None
        found.graph.inputs.append(value)
    for made in found.graph:
        if "N" in made.attributes:
            made.attributes["N"] = ir.AttrInt64("N", _weight(node).shape[1])
    work.temporary(_file(node)).write_bytes(ir.to_proto(found).SerializeToString())
    yield from (f"{name.replace('/', '.')}.raw" for name in begun)
    yield _file(node)


def _to_nbits(builder: Any, to_nbits: Callable[[Any], Any], alone: ir.Model) -> Any:
    whole, builder.model = builder.model, alone
    try:
        return to_nbits(builder)
    finally:
        builder.model = whole


def _pieces(builder: Any, node: Any) -> Iterator[Any]:
    """The weight of a node in pieces: columns of a MatMul's [inputs, outputs], rows of an embedding."""
    weight = _weight(node)
    axis = 0 if node.op_type == "Gather" else 1
    outputs, inputs = weight.shape[axis], weight.shape[1 - axis]
    step = max(MATRIX_PIECE // inputs, 1)
    # QDQ keeps [inputs, outputs], whose pieces are no rows
    if outputs <= step or builder.quant_attrs["use_qdq"]:
        yield weight.const_value
        return
    values = weight.const_value.numpy()
    for begin in range(0, outputs, step):
        part = values[:, begin : begin + step] if axis else values[begin : begin + step]
        yield ir.tensor(np.ascontiguousarray(part), name=weight.name)


def external(tensor: Any, path: Path, shape: Any) -> ir.ExternalTensor:
    """A tensor of ``shape`` whose bytes are the whole file ``path``, with the name and type of ``tensor``."""
    return ir.ExternalTensor(
        path.name,
        offset=0,
        length=math.ceil(math.prod(shape) * tensor.dtype.itemsize),
        dtype=tensor.dtype,
        shape=shape,
        name=tensor.name,
        base_dir=path.parent,
    )


def _alone(node: Any, whole: ir.Model, weight: Any) -> ir.Model:
    """A model of one node with ``weight``; what else it takes from the whole graph are inputs or its weights there."""
    copies = {value.name: _copy(value) for value in node.inputs}
    copies[_weight(node).name].const_value, copies[_weight(node).name].shape = weight, weight.shape
    outputs = [_copy(value) for value in node.outputs]
    inputs = [copies[value.name] for value in node.inputs]
    graph = ir.Graph(
        [value for value in copies.values() if value.const_value is None],
        outputs,
        nodes=[_node_like(node, inputs, outputs)],
        initializers=[value for value in copies.values() if value.const_value is not None],
        opset_imports=dict(whole.graph.opset_imports),
        name=whole.graph.name,
    )
    return ir.Model(graph, ir_version=whole.ir_version)


def _copy(value: Any) -> Any:
    return ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)


def _node_like(node: Any, inputs: list[Any], outputs: list[Any]) -> ir.Node:
    attributes = list(node.attributes.values())
    return ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=node.name)


def _put_back(graph: Any, node: Any, found: Any) -> None:
    """Replace ``node`` by what the quantiser made of it."""
    known: dict[str, Any] = {value.name: value for value in node.inputs}
    for name, value in found.initializers.items():
        if name not in graph.initializers:
            graph.register_initializer(_copy(value))
        known[name] = graph.initializers[name]
    made = []
    for item in found:
        outputs = [_copy(value) for value in item.outputs]
        made.append(_node_like(item, [None if value is None else known[value.name] for value in item.inputs], outputs))
        known |= {value.name: value for value in outputs}
    news = [known[value.name] for value in node.outputs]
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, list(node.outputs), news)
