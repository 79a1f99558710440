"""Read from the finished graph what the plan asked for; a request that was ignored is an error."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_onnx.artifact.folded import Folded
from qwen_onnx.artifact.stored import UINT8
from qwen_onnx.errors import ExportError
from qwen_onnx.export.readback.common import provider_of, refuse

if TYPE_CHECKING:
    from qwen_onnx.catalog.schema import Readback

HEAD_NODE = "lm_head"
# matrices that stay float in an int4 graph: what chooses experts, and the gates of linear attention
ROUTING = ("/moe/router/", "/shared_expert_gate/", "/linear_attn/a_proj/", "/linear_attn/b_proj/")
FC1_ZERO_POINTS = 11  # input of QMoE
# onnx.TensorProto.DataType: FLOAT, FLOAT16; UINT8, INT8, UINT4, INT4
BITS = {1: 32, 10: 16, 2: 8, 3: 8, 21: 4, 22: 4}
FLOATS = (1, 10)
# bits of the codes that may be stored in planes
PLANES_OF = 8


def read_graph(model: Path) -> dict[str, Any]:
    """Quantisation facts of an ONNX file and of the ``genai_config.json`` beside it.

    Returns:
        ``nodes``: one entry per quantised matrix with form, bits, block_size, accuracy_level (None in QDQ form),
        symmetric (no zero points), stored_bits of a code (fewer than bits: in planes), scale_bits of a stored scale
        and scale_block, the weights that share it (both None in QDQ form); ``experts``: the same per QMoE;
        ``counts``: operator counts; ``floats``: bits of the constant weight of each float MatMul; ``float_experts``:
        names of MoE nodes; ``io_bits``: bits of every float input and output; ``provider``: genai's name of the
        execution provider; ``prune_lm_head``: whether the logits have one position, whatever the length of the input.
    """
    import onnx

    loaded = onnx.load(str(model), load_external_data=False)
    graph, folded = loaded.graph, Folded(loaded, model, ExportError)
    # what is an input, too, is a slot for an adapter: no constant
    given = {value.name for value in graph.input}
    constants = {tensor.name: tensor.data_type for tensor in graph.initializer if tensor.name not in given}
    nodes = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            nodes[node.name] = _nbits_facts(node, folded)
        elif node.op_type == "DequantizeLinear" and node.input[0] in constants:
            nodes[node.name] = _qdq_facts(node, constants[node.input[0]])
    floats = {
        node.name: _float_bits(constants[name])
        for node in graph.node
        if node.op_type == "MatMul"
        for name in node.input
        if name in constants
    }
    experts = {node.name: _experts(node) for node in graph.node if node.op_type == "QMoE"}
    logits = next(output for output in graph.output if output.name == "logits")
    types = (value.type.tensor_type.elem_type for value in (*graph.input, *graph.output))
    return {
        "nodes": nodes,
        "experts": experts,
        "counts": dict(Counter(n.op_type for n in graph.node)),
        "floats": floats,
        "float_experts": [node.name for node in graph.node if node.op_type == "MoE"],
        "io_bits": sorted({bits for kind in types if (bits := _float_bits(kind))}),
        "provider": provider_of(model.parent),
        "prune_lm_head": logits.type.tensor_type.shape.dim[1].dim_value == 1,
    }


def _nbits_facts(node: Any, folded: Folded) -> dict[str, Any]:
    attributes = {a.name: a.i for a in node.attribute}
    codes, scales = folded.kind(node.input[1]), folded.sources(node.input[2])
    # of planes, beside which a few masks and shifts do not count
    stored = _stored(folded.sources(node.input[1]), (UINT8,))
    return {
        "form": "MatMulNBits",
        "bits": attributes["bits"],
        "block_size": attributes["block_size"],
        "accuracy_level": attributes.get("accuracy_level", 0),
        "symmetric": len(node.input) <= 3 or not node.input[3],
        "stored_bits": attributes["bits"] * stored // max(codes.count, 1),
        "scale_bits": max((_float_bits(part.data_type) or 0 for part in scales), default=0),
        # of scales that are repeated when the model loads, one is stored
        "scale_block": attributes["block_size"] * folded.kind(node.input[2]).count // max(_stored(scales, FLOATS), 1),
    }


def _qdq_facts(node: Any, kind: int) -> dict[str, Any]:
    return {
        "form": "QDQ",
        "bits": BITS.get(kind),
        "block_size": next((a.i for a in node.attribute if a.name == "block_size"), None),
        "accuracy_level": None,
        "symmetric": len(node.input) <= 2 or not node.input[2],
        "stored_bits": BITS.get(kind),
        "scale_bits": None,
        "scale_block": None,
    }


def _stored(tensors: Sequence[Any], kinds: Sequence[int]) -> int:
    """Elements of the tensors of these types."""
    return sum(math.prod(part.dims) for part in tensors if part.data_type in kinds)


def _float_bits(kind: int) -> int | None:
    return BITS[kind] if kind in FLOATS else None


def _experts(node: Any) -> dict[str, Any]:
    attributes = {a.name: a.i for a in node.attribute}
    return {
        "bits": attributes.get("expert_weight_bits", 4),
        "block_size": attributes.get("block_size", 0),
        "accuracy_level": attributes.get("accuracy_level", 0),
        "symmetric": not any(node.input[FC1_ZERO_POINTS : FC1_ZERO_POINTS + 2]),
    }


def compare(facts: dict[str, Any], asked: Readback) -> dict[str, Any]:
    """Compare the graph with the plan.

    Returns:
        A summary for the manifest: number of matrices, and of layers of experts, by (form, bits, block size, symmetry,
        accuracy level).

    Raises:
        ExportError: naming every kind of difference and one node that shows it.
    """
    faults = [
        f"{name} is {facts[name]}, asked {getattr(asked, name)}"
        for name in ("provider", "prune_lm_head")
        if facts[name] != getattr(asked, name)
    ]
    if facts["io_bits"] != [asked.io_bits]:
        faults.append(f"inputs and outputs have {facts['io_bits']} bits, asked {asked.io_bits}")
    if not facts["nodes"] and asked.form != "float":
        faults.append(f"the graph holds no weights in the form {asked.form}")
    if asked.form != "float":
        faults += [f"{name} has float experts" for name in facts["float_experts"][:3]]
    for name, node in facts["experts"].items():
        faults += _expert_differences(name, node, asked)
    if asked.experts and not facts["experts"]:
        faults.append("the graph holds no QMoE")
    named = {name: node["bits"] for name, node in facts["nodes"].items()} | facts["floats"]
    body = [bits for name, bits in named.items() if HEAD_NODE not in name]
    if asked.body_bits not in body + [node["bits"] for node in facts["experts"].values()]:
        faults.append(f"no matrix of the body has {asked.body_bits} bits")
    floats = {
        name: bits
        for name, bits in facts["floats"].items()
        if bits not in _floats_of(name, asked) and not any(part in name for part in ROUTING)
    }
    faults += [f"{name} is a float MatMul of {bits} bits" for name, bits in list(floats.items())[:3]]
    for name, node in facts["nodes"].items():
        faults += _differences(name, node, asked)
    planes = [node["stored_bits"] for node in facts["nodes"].values() if node["stored_bits"] != node["bits"]]
    if min(asked.stored_bits, default=PLANES_OF) < PLANES_OF and not planes:
        faults.append(f"no matrix is stored in planes, asked {sorted(asked.stored_bits)} bits")
    refuse("the graph", faults)
    return {
        "matrices": _kinds(facts["nodes"]),
        "experts": _kinds(facts["experts"]),
        "float_matrices": {str(bits): count for bits, count in Counter(facts["floats"].values()).items()},
        "operators": facts["counts"],
        "io_bits": asked.io_bits,
        "provider": facts["provider"],
        "prune_lm_head": facts["prune_lm_head"],
    }


def read_back(folder: Path, asked: Readback) -> dict[str, Any]:
    """``compare`` the ONNX file of ``folder``."""
    return compare(read_graph(folder / "model.onnx"), asked)


def _kinds(nodes: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    kinds = Counter(tuple(sorted(node.items())) for node in nodes.values())
    return [{**dict(kind), "count": count} for kind, count in sorted(kinds.items(), key=str)]


def _expert_differences(name: str, node: dict[str, Any], asked: Readback) -> list[str]:
    if asked.experts is None:
        return [f"{name} is a mixture of experts, the plan says nothing of one"]
    experts = asked.experts
    blocks = [experts.block_size, *experts.finer_blocks]
    wanted = {"bits": experts.bits, "symmetric": experts.symmetric, "accuracy_level": asked.accuracy_level}
    faults = [f"{name}: {key} is {node[key]}, asked {value}" for key, value in wanted.items() if node[key] != value]
    if node["block_size"] not in blocks:
        faults.append(f"{name}: block_size is {node['block_size']}, asked {' or '.join(map(str, blocks))}")
    return faults


def _floats_of(name: str, asked: Readback) -> set[int | None]:
    """Bits that a float matrix of this name may have."""
    return {asked.head_bits} if HEAD_NODE in name else {asked.body_bits, asked.float_bits}


def _differences(name: str, node: dict[str, Any], asked: Readback) -> list[str]:
    allowed_bits = {asked.head_bits} if HEAD_NODE in name else {asked.body_bits, 8}
    same = ("form", "accuracy_level", "symmetric")
    faults = [
        f"{name}: {key} is {node[key]}, asked {getattr(asked, key)}" for key in same if node[key] != getattr(asked, key)
    ]
    if node["bits"] not in allowed_bits:
        faults.append(f"{name}: {node['bits']} bits, asked {sorted(allowed_bits)}")
    blocks = [asked.block_size, *asked.finer_blocks]
    if node["block_size"] not in blocks:
        faults.append(f"{name}: block_size is {node['block_size']}, asked {' or '.join(map(str, blocks))}")
    stored = {node["bits"]} if node["bits"] != PLANES_OF else {*map(int, asked.stored_bits or (PLANES_OF,))}
    if node["stored_bits"] not in stored:
        faults.append(f"{name}: its codes are stored in {node['stored_bits']} bits, asked {sorted(stored)}")
    if asked.scale_block is not None and node["scale_block"] != asked.scale_block:
        faults.append(f"{name}: {node['scale_block']} weights share a stored scale, asked {asked.scale_block}")
    if asked.scale_bits is not None and node["scale_bits"] != asked.scale_bits:
        faults.append(f"{name}: its scales are stored in {node['scale_bits']} bits, asked {asked.scale_bits}")
    return faults
