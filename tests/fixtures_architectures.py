"""Tiny seeded checkpoints, one maker per architecture: 64 dimensions, two to four layers, logits of deviation 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tests.conftest import byte_tokenizer

VOCABULARY = 288
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHARED: dict[str, Any] = {**EXPERTS, "shared_expert_intermediate_size": 128}


def qwen2() -> Any:
    """Qwen1.5, Qwen2, Qwen2.5, dense."""
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**BASE))


def qwen3() -> Any:
    """Qwen3 dense, with heads wider than hidden_size over heads and a head that is the embedding."""
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**BASE | {"head_dim": 32, "tie_word_embeddings": True}))


def qwen2_moe() -> Any:
    """Qwen1.5-MoE, Qwen2-MoE: shared expert, weights of the chosen experts not normalised."""
    return tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**BASE, **SHARED, norm_topk_prob=False))


def qwen3_moe() -> Any:
    """Qwen3-MoE: no shared expert, weights normalised."""
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**BASE, **EXPERTS, head_dim=32, norm_topk_prob=True))


LINEAR: dict[str, Any] = {
    "num_hidden_layers": 4,  # three of linear attention, then one of full attention
    "head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
}
# published checkpoints announce a head for multi-token prediction
DRAFT = {"mtp_num_hidden_layers": 1}
ROPE = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
MROPE = ROPE | {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
VISION = {
    "depth": 1,
    "hidden_size": 64,
    "num_heads": 4,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
}
IMAGES = {"image_token_id": 280, "video_token_id": 281, "vision_start_token_id": 282, "vision_end_token_id": 283}


def qwen3_5() -> Any:
    """Qwen3.5 dense as published: with a vision tower, which the text export leaves out."""
    text = BASE | LINEAR | DRAFT | {"rope_parameters": MROPE}
    config = tf.Qwen3_5Config(text_config=text, vision_config=VISION, tie_word_embeddings=False, **IMAGES)
    return tf.Qwen3_5ForConditionalGeneration(config)


def qwen3_5_moe() -> Any:
    """Qwen3.5-MoE."""
    text = BASE | LINEAR | SHARED | DRAFT | {"rope_parameters": MROPE}
    config = tf.Qwen3_5MoeConfig(text_config=text, vision_config=VISION, tie_word_embeddings=False, **IMAGES)
    return tf.Qwen3_5MoeForConditionalGeneration(config)


def qwen3_next() -> Any:
    """Qwen3-Next: linear attention with fused projections, experts, a shared expert."""
    config = tf.Qwen3NextConfig(**BASE | LINEAR | SHARED, norm_topk_prob=True, rope_parameters=ROPE)
    return tf.Qwen3NextForCausalLM(config)


MAKERS: dict[str, Callable[[], Any]] = {
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Qwen2MoeForCausalLM": qwen2_moe,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "Qwen3NextForCausalLM": qwen3_next,
    "Qwen3_5ForConditionalGeneration": qwen3_5,
    "Qwen3_5MoeForConditionalGeneration": qwen3_5_moe,
}


def make_checkpoint(architecture: str, folder: Path, seed: int = 0) -> Path:
    """Write the tiny checkpoint of ``architecture``.

    Matrices have deviation 1/√inputs: the logits then have deviation 1 and lm_head needs no scaling. Routers have
    twice that, so that the chosen experts hold neither all nor an equal share of the weight. Embeddings have deviation
    1, as the sum of what the layers add: otherwise gated normalisations of nearly nothing make PyTorch's own fp32
    differ from its fp64 by 2e-3 (Qwen3.5).
    """
    torch.manual_seed(seed)
    model = MAKERS[architecture]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("embed_tokens.weight") and not model.config.get_text_config().tie_word_embeddings:
                parameter.normal_()
            elif parameter.dim() > 1:
                routes = name.endswith("mlp.gate.weight")
                parameter.normal_(0, 2 * parameter.shape[-1] ** -0.5 if routes else parameter.shape[-1] ** -0.5)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
