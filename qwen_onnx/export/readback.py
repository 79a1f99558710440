"""Read from the finished graph what the plan asked for; a request that was ignored is an error."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from qwen_onnx.errors import ExportError
from qwen_onnx.schema import Readback

HEAD_NODE = "lm_head"


def read_graph(model: Path) -> dict[str, Any]:
    """Quantisation facts of an ONNX file.

    Returns:
        ``nodes``: one entry per MatMulNBits with bits, block_size, accuracy_level, symmetric (no zero points);
        ``counts``: operator counts; ``float_matmuls``: names of MatMul nodes with a constant float weight;
        ``prune_lm_head``: whether the logits have one position, whatever the length of the input.
    """
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    nodes = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            attributes = {a.name: a.i for a in node.attribute}
            zero_points = len(node.input) > 3 and bool(node.input[3])
            nodes[node.name] = {
                "bits": attributes["bits"],
                "block_size": attributes["block_size"],
                "accuracy_level": attributes.get("accuracy_level", 0),
                "symmetric": not zero_points,
            }
    floats = [n.name for n in graph.node if n.op_type == "MatMul" and any(name in constants for name in n.input)]
    logits = next(output for output in graph.output if output.name == "logits")
    return {
        "nodes": nodes,
        "counts": dict(Counter(n.op_type for n in graph.node)),
        "float_matmuls": floats,
        "prune_lm_head": logits.type.tensor_type.shape.dim[1].dim_value == 1,
    }


def compare(facts: dict[str, Any], asked: Readback) -> dict[str, Any]:
    """Compare the graph with the plan.

    Returns:
        A summary for the manifest: number of matrices by (bits, block size, symmetry, accuracy level).

    Raises:
        ExportError: naming every kind of difference and one node that shows it.
    """
    faults = [f"{name} is a float MatMul" for name in facts["float_matmuls"][:3]]
    if not facts["nodes"]:
        faults.append("the graph holds no MatMulNBits")
    for name, node in facts["nodes"].items():
        faults += _differences(name, node, asked)
    body = [node["bits"] for name, node in facts["nodes"].items() if HEAD_NODE not in name]
    if body and asked.body_bits not in body:
        faults.append(f"no matrix of the body has {asked.body_bits} bits")
    if facts["prune_lm_head"] != asked.prune_lm_head:
        faults.append(f"prune_lm_head is {facts['prune_lm_head']}, asked {asked.prune_lm_head}")
    if faults:
        shown = "; ".join(faults[:6]) + (f"; and {len(faults) - 6} more" if len(faults) > 6 else "")
        raise ExportError(f"the graph is not what the plan asked for: {shown}", hint="qwen-onnx plan shows the request")
    kinds = Counter(tuple(sorted(node.items())) for node in facts["nodes"].values())
    return {
        "matrices": [{**dict(kind), "count": count} for kind, count in sorted(kinds.items(), key=str)],
        "operators": facts["counts"],
        "prune_lm_head": facts["prune_lm_head"],
    }


def _differences(name: str, node: dict[str, Any], asked: Readback) -> list[str]:
    allowed_bits = {asked.head_bits} if HEAD_NODE in name else {asked.body_bits, 8}
    wanted = {"block_size": asked.block_size, "accuracy_level": asked.accuracy_level, "symmetric": asked.symmetric}
    faults = [f"{name}: {key} is {node[key]}, asked {value}" for key, value in wanted.items() if node[key] != value]
    if node["bits"] not in allowed_bits:
        faults.append(f"{name}: {node['bits']} bits, asked {sorted(allowed_bits)}")
    return faults
