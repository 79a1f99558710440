"""The architectures that can be exported, as ``config.json`` names them, and what their weights are.

What each needs of the exporter is in ``qwen_onnx/export/architectures/registry.py``.
"""

from __future__ import annotations

from typing import Literal

# dense: all weights are linear layers; mixture: attention and experts; hybrid: linear attention besides
Kind = Literal["dense", "mixture", "hybrid"]

ARCHITECTURES: dict[str, Kind] = {
    "QWenLMHeadModel": "dense",
    "Qwen2ForCausalLM": "dense",
    "Qwen2MoeForCausalLM": "mixture",
    "Qwen3ForCausalLM": "dense",
    "Qwen3MoeForCausalLM": "mixture",
    "Qwen3NextForCausalLM": "hybrid",
    "Qwen3_5ForConditionalGeneration": "hybrid",
    "Qwen3_5MoeForConditionalGeneration": "hybrid",
}


def of_kind(kind: Kind) -> frozenset[str]:
    """The architectures whose weights are of one kind."""
    return frozenset(name for name, known in ARCHITECTURES.items() if known == kind)


DENSE, MIXTURES, HYBRIDS = of_kind("dense"), of_kind("mixture"), of_kind("hybrid")
QWEN1 = "QWenLMHeadModel"
