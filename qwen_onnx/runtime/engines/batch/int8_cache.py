"""A KV cache of int8 for a graph whose cache is float32: a quarter of the memory.

GroupQueryAttention rounds each new key and value by the scale of its channel before anything reads it, and multiplies
with what it rounded: a prompt read in one piece sees the same numbers as one that is read token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qwen_onnx.artifact.kv_scales import Floats

# gives scales [layers, 2, heads, head size] of the sizes that it is told
Scales = Callable[[tuple[int, ...]], Floats]
# inputs of GroupQueryAttention
PAST_KEY, PAST_VALUE, K_SCALE, V_SCALE = 3, 4, 12, 13
PER_CHANNEL = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}


def attention_nodes(graph: Any, layers: Sequence[tuple[str, str]]) -> list[Any] | None:
    """The nodes that hold these (past key, past value), in their order; None where one is no GroupQueryAttention."""
    held = {
        tuple(node.input[PAST_KEY : PAST_VALUE + 1]): node
        for node in graph.node
        if node.op_type == "GroupQueryAttention"
    }
    nodes = [held.get(pair) for pair in layers]
    return None if None in nodes else nodes


def with_int8_cache(graph: Any, names: Sequence[tuple[str, str]], scales: Callable[[], Floats]) -> bool:
    """Make the cache int8.

    Args:
        names: of past and present, keys and values of a layer next to each other; see ``KvLayout``.
        scales: gives [layers, 2, heads, head size], once the graph can have such a cache.

    Returns:
        Whether it can.
    """
    import onnx
    from onnx import helper, numpy_helper

    past = [name for name, _ in names]
    nodes = attention_nodes(graph, list(zip(past[::2], past[1::2], strict=True)))
    if nodes is None:
        return False
    for layer, (node, pair) in enumerate(zip(nodes, scales(), strict=True)):
        node.input.extend([""] * (V_SCALE + 1 - len(node.input)))
        for place, values in zip((K_SCALE, V_SCALE), pair, strict=True):
            node.input[place] = f"qwen_onnx.kv_scale.{layer}.{place}"
            graph.initializer.append(numpy_helper.from_array(values.reshape(-1), node.input[place]))
        node.attribute.extend(helper.make_attribute(name, value) for name, value in PER_CHANNEL.items())
    cache = {name for pair in names for name in pair}
    for entry in (*graph.input, *graph.output, *graph.value_info):
        if entry.name in cache:
            entry.type.tensor_type.elem_type = onnx.TensorProto.INT8
    return True
