"""Repairs of what genai's builder or ONNX Runtime's operators get wrong, in the finished graph.

The weights stay where they are: only the graph file is loaded and written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROUTER_WEIGHTS = 14  # input of QMoE


def repair(model: Path, accuracy_level: int | None) -> None:
    """Apply all repairs to an ONNX file in place.

    Args:
        accuracy_level: of the experts' matrix products; None leaves QMoE's own default, fp32 activations.
    """
    import onnx

    graph_file = onnx.load(str(model), load_external_data=False)
    repair_shared_head(graph_file.graph)
    for node in [node for node in graph_file.graph.node if node.op_type == "QMoE"]:
        if accuracy_level is not None:
            set_accuracy_level(node, accuracy_level)
        keep_routing_mass(graph_file.graph, node)
    # genai appends the commit of whatever git repository it happens to be installed below
    graph_file.producer_version = graph_file.producer_version.partition("+")[0]
    onnx.save(graph_file, str(model))


def set_accuracy_level(node: Any, level: int) -> None:
    """Give QMoE the level that was asked for: genai 0.18 writes it to MatMulNBits only."""
    from onnx import helper

    kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("accuracy_level", level)])


def repair_shared_head(graph: Any) -> None:
    """Give the scales and zero points of a shared, already quantised lm_head their two dimensions.

    genai 0.18 writes them flat, which MatMulNBits takes and the embedding's GatherBlockQuantized refuses: the
    model would not load. Only the declared shape changes, the bytes are row-major already.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    flat = [
        tensors[name]
        for node in graph.node
        if node.op_type == "GatherBlockQuantized"
        for name in node.input[2:]
        if len(tensors[name].dims) == 1
    ]
    if not flat:
        return
    rows = next(tensor.dims[0] for name, tensor in tensors.items() if name.endswith("lm_head.MatMulNBits.qweight"))
    for tensor in flat:
        tensor.dims[:] = [rows, tensor.dims[0] // rows]


def keep_routing_mass(graph: Any, node: Any) -> None:
    """Make a QMoE node mix its experts by their share of the softmax over all experts, where it is asked to.

    The CPU kernel of ONNX Runtime 1.32 ignores normalize_routing_weights=0 and lets the chosen experts' weights
    add up to 1. It heeds the attribute when the weights come as an input of their own, so that is what it gets: the
    softmax of the router's logits, [tokens, experts]. Qwen2-MoE needs this, models with norm_topk_prob do not.
    """
    from onnx import helper

    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if attributes.get("normalize_routing_weights", 0):
        return
    weights = f"{node.name}/router_weights"
    node.input.extend([""] * (ROUTER_WEIGHTS - len(node.input)))
    softmax = helper.make_node("Softmax", [node.input[1]], [weights], name=f"{node.name}/Softmax", axis=-1)
    node.input.append(weights)
    position = next(index for index, other in enumerate(graph.node) if other.name == node.name)
    graph.node.insert(position, softmax)
