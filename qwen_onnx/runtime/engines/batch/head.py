"""The head of a graph that computes the logits of the last position alone, opened up: the caller says which positions.

An answer needs the last position's logits, the log probabilities of a prompt need every one. Weights and kernels stay
those of the artifact; a second session would hold them twice.
"""

from __future__ import annotations

from typing import Any

HEADS = ("MatMulNBits", "MatMul")
# input of the graph: indices of the positions, as NumPy has them (-1 is the last one)
POSITIONS = "logits_positions"


def pruned_head(graph: Any) -> tuple[Any, Any] | None:
    """The nodes at both ends of Gather(last) - Unsqueeze - head, as genai's builder writes ``prune_lm_head``.

    Returns:
        Gather and head; None: the graph gives the logits of all positions, or prunes in another way.
    """
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in HEADS and node.input and "logits" in node.output:
            cut = makers.get(node.input[0])
            last = makers.get(cut.input[0]) if cut is not None and cut.op_type == "Unsqueeze" else None
            if last is not None and last.op_type == "Gather":
                return last, node
    return None


def with_positions(graph: Any) -> bool:
    """Give the graph the input ``POSITIONS``, int64 [positions]; its logits are [batch, positions, vocabulary].

    Returns:
        Whether there was something to open.
    """
    import onnx

    found = pruned_head(graph)
    if found is None:
        return False
    gather, head = found
    cut = next(node for node in graph.node if head.input[0] in node.output)
    # a list of indices keeps the dimension that Unsqueeze put back after a single one
    gather.input[1], head.input[0] = POSITIONS, gather.output[0]
    graph.node.remove(cut)
    graph.input.append(onnx.helper.make_tensor_value_info(POSITIONS, onnx.TensorProto.INT64, ["positions"]))
    # shapes that the builder noted for a single position
    kept = [value for value in graph.value_info if value.name not in (gather.output[0], cut.output[0])]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    logits = next(output for output in graph.output if output.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "positions"
    return True
