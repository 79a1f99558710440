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
SHARED: dict[str, Any] = {**EXPERTS, "shared_expert_intermediate_size": 96}


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


MAKERS: dict[str, Callable[[], Any]] = {
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Qwen2MoeForCausalLM": qwen2_moe,
    "Qwen3MoeForCausalLM": qwen3_moe,
}


def make_checkpoint(architecture: str, folder: Path, seed: int = 0) -> Path:
    """Write the tiny checkpoint of ``architecture``.

    Matrices have deviation 1/√inputs: the logits then have deviation 1 and lm_head needs no scaling. Routers have
    twice that, so that the chosen experts hold neither all nor an equal share of the weight.
    """
    torch.manual_seed(seed)
    model = MAKERS[architecture]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                routes = name.endswith("mlp.gate.weight")
                parameter.normal_(0, 2 * parameter.shape[-1] ** -0.5 if routes else parameter.shape[-1] ** -0.5)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
