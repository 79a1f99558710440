"""How many weights a ``config.json`` describes, those of the text model alone: what limits and sizes go by.

Every number of the config was checked before: see ``sources/checkpoint.py``.
"""

from __future__ import annotations

from typing import Any

from qwen_onnx.catalog.architectures import HYBRIDS, QWEN1, text_config
from qwen_onnx.catalog.schema import Shape

# with biases at q, k and v; Qwen3 and later have norms of q and k instead
BIASED = {
    "QWenLMHeadModel",
    "Qwen2AudioForConditionalGeneration",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
}
INTERVAL, KERNEL = 4, 4


def count_weights(config: dict[str, Any], architecture: str, shape: Shape) -> int:
    """Number of weights.

    Args:
        config: that of a whole checkpoint; a multimodal one has its ``text_config``.
        shape: of the same config.
    """
    text = text_config(config)
    hidden, vocabulary, layers = shape.hidden_size or 0, shape.vocab_size or 0, shape.layers or 0
    total = vocabulary * hidden * (1 if shape.tied else 2) + hidden
    sparse = _sparse_layers(text, layers) if shape.experts else 0
    linear = _linear_layers(text, layers) if architecture in HYBRIDS else 0
    total += (layers - linear) * _attention(text, architecture, shape) + linear * _linear_attention(text, hidden)
    total += sparse * _experts(shape) + (layers - sparse) * _mlp(architecture, shape)
    return total + layers * 2 * hidden


def _attention(text: dict[str, Any], architecture: str, shape: Shape) -> int:
    hidden, heads, groups = shape.hidden_size or 0, shape.heads or 0, shape.kv_heads or 0
    head_dim = shape.head_dim or hidden // heads
    wide, narrow = heads * head_dim, groups * head_dim
    # a hybrid's queries come with a gate of the same size
    queries = 2 * wide if architecture in HYBRIDS else wide
    matrices = hidden * (queries + 2 * narrow) + wide * hidden
    if architecture in BIASED:
        return matrices + queries + 2 * narrow
    biases = queries + 2 * narrow + hidden if text.get("attention_bias") else 0
    return matrices + biases + 2 * head_dim


def _linear_attention(text: dict[str, Any], hidden: int) -> int:
    def size(name: str, usual: int = 0) -> int:
        return int(text.get(name) or usual)

    heads, head_dim = size("linear_num_value_heads"), size("linear_value_head_dim")
    keys, values = size("linear_num_key_heads") * size("linear_key_head_dim"), heads * head_dim
    mixed = 2 * keys + values
    gates = hidden * (values + 2 * heads)
    convolution = mixed * size("linear_conv_kernel_dim", KERNEL)
    # decay and step of each head, the norm of its output
    return hidden * mixed + gates + convolution + 2 * heads + head_dim + values * hidden


def _experts(shape: Shape) -> int:
    hidden, count, width = shape.hidden_size or 0, shape.experts or 0, shape.moe_intermediate_size or 0
    shared = shape.shared_expert_intermediate_size or 0
    return hidden * (count + 3 * count * width) + (3 * hidden * shared + hidden if shared else 0)


def _mlp(architecture: str, shape: Shape) -> int:
    hidden, inner = shape.hidden_size or 0, shape.intermediate_size or 0
    # Qwen 1.0 counts gate and up projection together
    return 3 * hidden * (inner // 2 if architecture == QWEN1 else inner)


def _sparse_layers(text: dict[str, Any], layers: int) -> int:
    step, dense = text.get("decoder_sparse_step") or 1, set(text.get("mlp_only_layers") or ())
    return sum(index not in dense and (index + 1) % step == 0 for index in range(layers))


def _linear_layers(text: dict[str, Any], layers: int) -> int:
    named = text.get("layer_types")
    if named:
        return sum(name == "linear_attention" for name in named[:layers])
    interval = text.get("full_attention_interval") or INTERVAL
    return sum((index + 1) % interval != 0 for index in range(layers))
