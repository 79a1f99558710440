"""Our Olive pass ``PackWeights``: the same graph with smaller files.

A code below 2**7 of an 8-bit MatMulNBits is stored in 4 to 7 bits, as one plane of four bits and others of two and one;
a float32 scale that half precision holds exactly is stored so; scales and zero points that neighbouring blocks repeat
are stored once. Nodes of the graph put them together again under the names that they had: ONNX Runtime folds these
nodes when it loads, and its 8-bit kernels see what they saw before. No weight changes by a bit.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from qwen_onnx.artifact.stored import FLOAT, UINT8, is_external, stored_array
from qwen_onnx.errors import ExportError
from qwen_onnx.export.options import parameters
from qwen_onnx.export.passes.pack_weights.data_file import DataFile
from qwen_onnx.export.passes.pack_weights.options import PackWeightsOptions
from qwen_onnx.export.passes.pack_weights.planes import Packer
from qwen_onnx.export.progress import progress

# BitwiseAnd and BitwiseOr came with it
OPSET = 18
EXPERT_SCALES = (3, 6)  # inputs of QMoE


class PackWeights(Pass):  # type: ignore[misc]
    """Store the weights of a graph in fewer bytes."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return parameters(PackWeightsOptions)

    def _run_for_config(
        self, model: ONNXModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        source = Path(model.model_path)
        pack(source, Path(output_model_path))
        return ONNXModelHandler(output_model_path, onnx_file_name=source.name)


def pack(source: Path, output: Path) -> None:
    """Write the packed graph of ``source`` and the files beside it into the folder ``output``, the graph last.

    One matrix is read at a time, some rows of it at once.

    Raises:
        ExportError: the graph's opset lacks the operators, it has tensors where none of ours has, or its data are not
            where it says.
    """
    import onnx

    model = onnx.load(str(source), load_external_data=False)
    _check(model, source)
    output.mkdir(parents=True, exist_ok=True)
    roles = _roles(model.graph)
    tensors = list(model.graph.initializer)
    matrices = {node.input[1] for node in model.graph.node if node.op_type == "MatMulNBits"}
    progress(f"packing the weights of {len(matrices)} matrices")
    locations = {item.value for tensor in tensors for item in tensor.external_data if item.key == "location"}
    with DataFile(output / f"{source.name}.data") as data:
        packer = Packer(data)
        for tensor in tensors:
            _write(tensor, roles.get(tensor.name), source, packer)
    for path in sorted(source.parent.iterdir()):
        if path.is_file() and path.name not in {*locations, source.name}:
            shutil.copyfile(path, output / path.name)
    graph = model.graph
    nodes = [*packer.nodes, *graph.node]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(packer.tensors)
    onnx.save(model, str(output / source.name))


def _check(model: Any, source: Path) -> None:
    opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)
    if opset < OPSET:
        hint = "leave the step PackWeights out"
        raise ExportError(f"the graph has opset {opset}, bit planes need {OPSET}", where=str(source), hint=hint)
    for node in model.graph.node:
        for item in node.attribute:
            if item.HasField("g") or item.graphs or (item.HasField("t") and is_external(item.t)):
                what = f"{node.name} has a graph or weights of its own in {item.name}"
                raise ExportError(f"{what}, which PackWeights does not read", where=str(source))


def _roles(graph: Any) -> dict[str, str]:
    """What each constant is to the operators that read it: ``codes`` (zero points too) of 8 bits, or ``scales``."""
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    found: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "QMoE":
            floats = [node.input[place] for place in EXPERT_SCALES if kinds.get(node.input[place]) == FLOAT]
            found |= dict.fromkeys(floats, "scales")
        if node.op_type != "MatMulNBits":
            continue
        bits = next(item.i for item in node.attribute if item.name == "bits")
        _, codes, scales, *rest = node.input
        if bits == 8:
            found |= dict.fromkeys((name for name in (codes, *rest[:1]) if kinds.get(name) == UINT8), "codes")
        if kinds.get(scales) == FLOAT:
            found[scales] = "scales"
    return found


def _write(tensor: Any, role: str | None, source: Path, packer: Packer) -> None:
    """One constant, as small as its role lets it be."""
    if role == "codes":
        packer.codes(tensor, stored_array(tensor, source, ExportError))
    elif role == "scales":
        packer.scales(tensor, stored_array(tensor, source, ExportError))
    else:
        packer.copy(tensor, source)
