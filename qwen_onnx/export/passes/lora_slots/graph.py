"""A graph with slots for adapters (see ``artifact/adapter_slots.py``).

Beside ``y = W x`` of every matrix of a layer stands ``y + (x A) B``. A and B are initialisers of the graph that are its
inputs, too: whoever runs it may give others in their place, and need not know of them. Their own rank is 0.
"""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

from qwen_onnx.artifact.adapter_slots import METADATA, Part, Slot, Slots
from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.artifact.stored import FLOAT
from qwen_onnx.catalog.training import Matrix
from qwen_onnx.errors import ExportError
from qwen_onnx.export.progress import progress

# as genai's builder calls the matrices of a layer
NAMED = re.compile(r"/(?P<name>model/layers\.(?P<layer>\d+)/(?:attn|mlp)/(?P<matrix>\w+_proj))/MatMul\w*")
PACKED = "qkv_proj"


def insert_slots(source: Path, output: Path, rank: int) -> Slots:
    """Write the graph of ``source`` with slots, and the files beside it, into the folder ``output``.

    Raises:
        ExportError: a layer lacks one of the matrices that adapters know, or the graph computes in another type.
    """
    import onnx

    model = onnx.load(str(source), load_external_data=False)
    config = GenaiConfig.read(source.parent, ExportError, hint=None).model.decoder
    narrow = (config.num_key_value_heads or 0) * (config.head_size or 0)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    nodes, found = [], []
    for node in model.graph.node:
        nodes.append(node)
        named = NAMED.fullmatch(node.name)
        if named and node.op_type in ("MatMul", "MatMulNBits"):
            slot = _slot(node, named, shapes, narrow)
            found.append(slot)
            nodes += _insert(node, slot, model.graph)
    _check(found, model.graph, str(source))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    slots = Slots(rank=rank, slots=tuple(found))
    model.metadata_props.add(key=METADATA, value=slots.model_dump_json())
    progress(f"left slots for adapters beside {len(found)} matrices")
    output.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.parent.iterdir()):
        if path.is_file() and path.name != source.name:
            # a link would do, but onnx loads no weights that have two names
            shutil.copyfile(path, output / path.name)
    onnx.save(model, str(output / source.name))
    return slots


def _slot(node: Any, named: re.Match[str], shapes: dict[str, tuple[int, ...]], narrow: int) -> Slot:
    """The slot beside a matrix.

    Args:
        narrow: outputs of k and of v.
    """
    if node.op_type == "MatMul":
        inputs, outputs = shapes[node.input[1]]
    else:
        told = {item.name: item.i for item in node.attribute}
        inputs, outputs = told["K"], told["N"]
    matrix = named["matrix"]
    packed = {"q_proj": outputs - 2 * narrow, "k_proj": narrow, "v_proj": narrow}
    sizes = packed if matrix == PACKED else {matrix: outputs}
    parts = tuple(Part.model_validate({"matrix": name, "outputs": size}) for name, size in sizes.items())
    return Slot(layer=int(named["layer"]), name=named["name"].replace("/", "."), inputs=inputs, parts=parts)


def _insert(node: Any, slot: Slot, graph: Any) -> list[Any]:
    """The nodes of a slot, behind ``node``, whose output they take the name of."""
    import onnx

    whole = node.output[0]
    base, low, learnt = f"{whole}/base", f"{whole}/lora_A", f"{whole}/lora_B"
    node.output[0] = base
    # of this slot alone: sizes of one name share memory, and an adapter may fill the one slot and not the other
    rank = f"{slot.name}.rank"
    for name, empty, dims in (
        (slot.a, (slot.inputs, 0), (slot.inputs, rank)),
        (slot.b, (0, slot.outputs), (rank, slot.outputs)),
    ):
        graph.initializer.append(onnx.helper.make_tensor(name, FLOAT, empty, []))
        graph.input.append(onnx.helper.make_tensor_value_info(name, FLOAT, dims))
    place = node.name.rsplit("/", 1)[0]
    return [
        onnx.helper.make_node("MatMul", [node.input[0], slot.a], [low], name=f"{place}/lora_A/MatMul"),
        onnx.helper.make_node("MatMul", [low, slot.b], [learnt], name=f"{place}/lora_B/MatMul"),
        onnx.helper.make_node("Add", [base, learnt], [whole], name=f"{place}/lora/Add"),
    ]


def _check(found: list[Slot], graph: Any, where: str) -> None:
    """Every layer has all matrices that an adapter may name, and the graph computes in float32."""
    layers: dict[int, set[str]] = defaultdict(set)
    for slot in found:
        layers[slot.layer] |= {part.matrix for part in slot.parts}
    lacking = {layer: sorted(set(get_args(Matrix)) - names) for layer, names in layers.items()}
    faults = [f"layer {layer} lacks {', '.join(names)}" for layer, names in sorted(lacking.items()) if names]
    logits = next(output for output in graph.output if output.name == "logits")
    if logits.type.tensor_type.elem_type != FLOAT:
        faults.append("it does not compute in float32")
    if faults or not found:
        what = faults[0] if faults else "no layer has a matrix that is known"
        hint = "leave --adapter-rank out"
        raise ExportError(f"the graph cannot have slots for adapters: {what}", where=where, hint=hint)
