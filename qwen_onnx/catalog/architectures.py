"""The architectures that can be exported, as ``config.json`` names them, and what their weights are.

What each needs of the exporter is in ``qwen_onnx/export/architectures/registry.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

# dense: all weights are linear layers; mixture: attention and experts; hybrid: linear attention besides
Kind = Literal["dense", "mixture", "hybrid"]


class Known(NamedTuple):
    """What is known of an architecture before anything of a checkpoint is read.

    Attributes:
        kind: of the text weights.
        model_type: as ``config.json`` has it.
        sees, hears: its vision or audio tower is built, too; see ``senses`` for those that are published without one as
            well.
        renamed: its weights are copied under other names before they are read.
    """

    kind: Kind
    model_type: str
    sees: bool = False
    hears: bool = False
    renamed: bool = False


ARCHITECTURES: dict[str, Known] = {
    "QWenLMHeadModel": Known("dense", "qwen"),
    "Qwen2AudioForConditionalGeneration": Known("dense", "qwen2_audio", hears=True, renamed=True),
    "Qwen2ForCausalLM": Known("dense", "qwen2"),
    "Qwen2MoeForCausalLM": Known("mixture", "qwen2_moe"),
    "Qwen2VLForConditionalGeneration": Known("dense", "qwen2_vl", sees=True),
    "Qwen2_5_VLForConditionalGeneration": Known("dense", "qwen2_5_vl", sees=True),
    "Qwen3ASRForConditionalGeneration": Known("dense", "qwen3_asr", hears=True, renamed=True),
    "Qwen3ForCausalLM": Known("dense", "qwen3"),
    "Qwen3VLForConditionalGeneration": Known("dense", "qwen3_vl", sees=True, renamed=True),
    "Qwen3VLMoeForConditionalGeneration": Known("mixture", "qwen3_vl_moe", sees=True, renamed=True),
    "Qwen3MoeForCausalLM": Known("mixture", "qwen3_moe"),
    "Qwen3NextForCausalLM": Known("hybrid", "qwen3_next"),
    "Qwen3_5ForConditionalGeneration": Known("hybrid", "qwen3_5", sees=True),
    "Qwen3_5MoeForConditionalGeneration": Known("hybrid", "qwen3_5_moe", sees=True),
}


def of_kind(kind: Kind) -> frozenset[str]:
    """The architectures whose weights are of one kind."""
    return frozenset(name for name, known in ARCHITECTURES.items() if known.kind == kind)


DENSE, MIXTURES, HYBRIDS = of_kind("dense"), of_kind("mixture"), of_kind("hybrid")
SEEING = frozenset(name for name, known in ARCHITECTURES.items() if known.sees)
HEARING = frozenset(name for name, known in ARCHITECTURES.items() if known.hears)
# whose checkpoints have a head for multi-token prediction
DRAFTING = frozenset({"Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"})
# with a tower beside the text model
SENSING = SEEING | HEARING
QWEN1 = "QWenLMHeadModel"
# what published configs of Qwen2-Audio leave to transformers
UNSAID = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rope_theta": 1e4,
}


def whole_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` as transformers has it: Qwen publishes that of Qwen3-ASR within a ``thinker_config``."""
    thinker = config.get("thinker_config")
    if config.get("model_type") != "qwen3_asr" or not isinstance(thinker, Mapping):
        return dict(config)
    told = {name: thinker[name] for name in ("audio_config", "text_config", "audio_token_id") if name in thinker}
    return {**{name: value for name, value in config.items() if name != "thinker_config"}, **told}


def text_config(config: Mapping[str, Any]) -> Any:
    """The part of a ``config.json`` that is about text, which may not be an object: it is checked later."""
    config = whole_config(config)
    text = config.get("text_config") or config
    if config.get("model_type") == "qwen2_audio" and isinstance(text, Mapping):
        return {**UNSAID, **text}
    if config.get("model_type") == "qwen3_asr" and isinstance(text, Mapping):
        # transformers goes by what the whole says
        return {**text, "tie_word_embeddings": is_tied(config)}
    return text


def is_tied(config: Mapping[str, Any]) -> Any:
    """Whether the head is the embedding, as a ``config.json`` says; checked later: it may be anything."""
    told = config.get("tie_word_embeddings")
    if told is None and config.get("model_type") == "qwen3_asr":
        text = whole_config(config).get("text_config")
        # transformers' own, where nobody says
        return text.get("tie_word_embeddings", True) if isinstance(text, Mapping) else True
    return False if told is None else told


def senses(architecture: str, modality: str) -> bool:
    """Whether a tower is built; models with linear attention are made without one, too."""
    return architecture in SENSING and (architecture not in HYBRIDS or "vision" in modality)
