"""What configs of Qwen2-Audio say, and what published ones leave to transformers."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_onnx.catalog.sizes import shape_of
from qwen_onnx.catalog.weights import count_weights
from qwen_onnx.errors import UnsupportedModelError
from qwen_onnx.sources.audio_tower import QWEN2_AUDIO, audio_tower_of
from qwen_onnx.sources.checkpoint import check_config
from qwen_onnx.sources.text_form import text_settings

# as it is published: sizes of the text model are missing
CONFIG: dict[str, Any] = {
    "architectures": [QWEN2_AUDIO],
    "audio_config": {"model_type": "qwen2_audio_encoder", "num_mel_bins": 128, "scale_embedding": False},
    "audio_token_index": 151646,
    "model_type": "qwen2_audio",
    "text_config": {
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "intermediate_size": 11008,
        "max_position_embeddings": 8192,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000,
        "torch_dtype": "bfloat16",
        "vocab_size": 156032,
    },
}


def test_what_a_published_config_leaves_out_is_transformers_own() -> None:
    from transformers import Qwen2AudioConfig

    check_config(CONFIG, QWEN2_AUDIO, "it")
    tower, theirs = audio_tower_of(CONFIG, "it"), Qwen2AudioConfig.from_dict(CONFIG)
    told, text = text_settings(CONFIG, tower), theirs.text_config
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
        assert told[name] == getattr(text, name), name
    assert told["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000}
    assert told["architectures"] == ["Qwen2ForCausalLM"]
    audio = theirs.audio_config
    assert (tower.width, tower.depth, tower.heads) == (
        audio.d_model,
        audio.encoder_layers,
        audio.encoder_attention_heads,
    )
    assert (tower.inner, tower.positions) == (audio.encoder_ffn_dim, audio.max_source_positions)


def test_its_weights_are_counted() -> None:
    """As transformers would make them, without making them."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = shape_of(CONFIG)
    small = Qwen2Config(**{**CONFIG["text_config"], "num_hidden_layers": 1, "tie_word_embeddings": False})
    with torch.device("meta"):
        wanted = sum(each.numel() for each in Qwen2ForCausalLM(small).parameters())
    assert count_weights(CONFIG, QWEN2_AUDIO, shape.model_copy(update={"layers": 1})) == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio_config": []}, "audio_config is missing"),
        ({"audio_config": {"d_model": True}}, "d_model is True, not a number from 1 to 65,536"),
        ({"audio_config": {"max_source_positions": 10**6}}, "max_source_positions"),
        ({"audio_config": {"scale_embedding": True}}, "scale_embedding is True"),
        ({"audio_token_index": None}, "audio_token_index is None"),
        ({"audio_token_index": 156032}, "audio_token_index is 156032, not a token"),
    ],
)
def test_a_tower_that_cannot_be_right_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as fault:
        audio_tower_of(CONFIG | change, "config.json")
    assert fault.value.where == "config.json"
