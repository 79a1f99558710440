"""Read from the finished graph what the plan asked for; a request that was ignored is an error."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from qwen_onnx.errors import ExportError
from qwen_onnx.schema import Readback

HEAD_NODE = "lm_head"
# matrices that stay float in an int4 graph: what chooses experts, and the gates of linear attention
ROUTING = ("/moe/router/", "/shared_expert_gate/", "/linear_attn/a_proj/", "/linear_attn/b_proj/")
FC1_ZERO_POINTS = 11  # input of QMoE


def read_graph(model: Path) -> dict[str, Any]:
    """Quantisation facts of an ONNX file.

    Returns:
        ``nodes``: one entry per MatMulNBits with bits, block_size, accuracy_level, symmetric (no zero points);
        ``experts``: the same per QMoE; ``counts``: operator counts; ``float_matmuls``: names of MatMul nodes with a
        constant float weight; ``float_experts``: names of MoE nodes; ``prune_lm_head``: whether the logits have one
        position, whatever the length of the input.
    """
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    nodes = {node.name: _matrix(node) for node in graph.node if node.op_type == "MatMulNBits"}
    experts = {node.name: _experts(node) for node in graph.node if node.op_type == "QMoE"}
    floats = [n.name for n in graph.node if n.op_type == "MatMul" and any(name in constants for name in n.input)]
    logits = next(output for output in graph.output if output.name == "logits")
    return {
        "nodes": nodes,
        "experts": experts,
        "counts": dict(Counter(n.op_type for n in graph.node)),
        "float_matmuls": floats,
        "float_experts": [n.name for n in graph.node if n.op_type == "MoE"],
        "prune_lm_head": logits.type.tensor_type.shape.dim[1].dim_value == 1,
    }


def _matrix(node: Any) -> dict[str, Any]:
    attributes = {a.name: a.i for a in node.attribute}
    return {
        "bits": attributes["bits"],
        "block_size": attributes["block_size"],
        "accuracy_level": attributes.get("accuracy_level", 0),
        "symmetric": not (len(node.input) > 3 and bool(node.input[3])),
    }


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
        A summary for the manifest: number of matrices, and of layers of experts, by (bits, block size, symmetry,
        accuracy level).

    Raises:
        ExportError: naming every kind of difference and one node that shows it.
    """
    unexpected = [name for name in facts["float_matmuls"] if not any(part in name for part in ROUTING)]
    faults = [f"{name} is a float MatMul" for name in unexpected[:3]]
    faults += [f"{name} has float experts" for name in facts["float_experts"][:3]]
    if not facts["nodes"]:
        faults.append("the graph holds no MatMulNBits")
    for name, node in facts["nodes"].items():
        faults += _differences(name, node, asked)
    for name, node in facts["experts"].items():
        faults += _expert_differences(name, node, asked)
    if asked.experts and not facts["experts"]:
        faults.append("the graph holds no QMoE")
    body = [node["bits"] for name, node in facts["nodes"].items() if HEAD_NODE not in name]
    if body and asked.body_bits not in body:
        faults.append(f"no matrix of the body has {asked.body_bits} bits")
    if facts["prune_lm_head"] != asked.prune_lm_head:
        faults.append(f"prune_lm_head is {facts['prune_lm_head']}, asked {asked.prune_lm_head}")
    if faults:
        shown = "; ".join(faults[:6]) + (f"; and {len(faults) - 6} more" if len(faults) > 6 else "")
        raise ExportError(f"the graph is not what the plan asked for: {shown}", hint="qwen-onnx plan shows the request")
    return {
        "matrices": _kinds(facts["nodes"]),
        "experts": _kinds(facts["experts"]),
        "operators": facts["counts"],
        "prune_lm_head": facts["prune_lm_head"],
    }


def _kinds(nodes: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    kinds = Counter(tuple(sorted(node.items())) for node in nodes.values())
    return [{**dict(kind), "count": count} for kind, count in sorted(kinds.items(), key=str)]


def _expert_differences(name: str, node: dict[str, Any], asked: Readback) -> list[str]:
    if asked.experts is None:
        return [f"{name} is a mixture of experts, the plan says nothing of one"]
    wanted = {**asked.experts.model_dump(), "accuracy_level": asked.accuracy_level}
    return [f"{name}: {key} is {node[key]}, asked {value}" for key, value in wanted.items() if node[key] != value]


def _differences(name: str, node: dict[str, Any], asked: Readback) -> list[str]:
    allowed_bits = {asked.head_bits} if HEAD_NODE in name else {asked.body_bits, 8}
    wanted = {"block_size": asked.block_size, "accuracy_level": asked.accuracy_level, "symmetric": asked.symmetric}
    faults = [f"{name}: {key} is {node[key]}, asked {value}" for key, value in wanted.items() if node[key] != value]
    if node["bits"] not in allowed_bits:
        faults.append(f"{name}: {node['bits']} bits, asked {sorted(allowed_bits)}")
    return faults
