"""What configs of Qwen3-ASR say, as Qwen publishes them and as transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.sizes import shape_of
from qwen_onnx.catalog.weights import count_weights
from qwen_onnx.errors import SourceError, UnsupportedModelError
from qwen_onnx.sources.checkpoint import check_config, contradictions
from qwen_onnx.sources.chunked_tower import QWEN3_ASR, ChunkedTower, hearing_tower_of
from qwen_onnx.sources.split_tokenizer import write_tokenizer
from qwen_onnx.sources.text_form import text_settings

AUDIO: dict[str, Any] = {
    "d_model": 896,
    "downsample_hidden_size": 480,
    "encoder_attention_heads": 14,
    "encoder_ffn_dim": 3584,
    "encoder_layers": 18,
    "max_source_positions": 1500,
    "model_type": "qwen3_asr_audio_encoder",
    "n_window": 50,
    "n_window_infer": 800,
    "num_mel_bins": 128,
    "output_dim": 1024,
    "scale_embedding": False,
}
TEXT: dict[str, Any] = {
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 65536,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default", "type": "default"},
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
# of the form in which Qwen publishes it, with the sizes of 0.6B
PUBLISHED: dict[str, Any] = {
    "architectures": [QWEN3_ASR],
    "model_type": "qwen3_asr",
    "thinker_config": {"audio_config": AUDIO, "audio_token_id": 151676, "dtype": "bfloat16", "text_config": TEXT},
}


def test_a_published_config_is_read_within_its_thinker(repository: Path) -> None:
    check_config(PUBLISHED, QWEN3_ASR, "it")
    tower = hearing_tower_of(PUBLISHED, "it")
    assert tower == ChunkedTower(QWEN3_ASR, 128, 480, 18, 14, 3584, 896, 800, 1024, 151676)
    assert (tower.places, tower.heights) == (13, 16)
    _, row = load_catalog(repository).rows["qwen3-asr-0.6b"]
    assert contradictions(PUBLISHED, row.shape) == []
    shape = shape_of(PUBLISHED)
    assert shape.tied
    assert count_weights(PUBLISHED, QWEN3_ASR, shape) == row.parameters


def test_both_forms_come_to_one_text_model() -> None:
    """As transformers reads its own."""
    from transformers import Qwen3ASRConfig

    theirs = Qwen3ASRConfig(
        audio_config={
            name: value for name, value in AUDIO.items() if name not in ("max_source_positions", "model_type")
        },
        text_config={name: value for name, value in TEXT.items() if not name.startswith("rope")}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000}},
    )
    own = json.loads(theirs.to_json_string(use_diff=False)) | {"architectures": [QWEN3_ASR]}
    check_config(own, QWEN3_ASR, "it")
    tower = hearing_tower_of(own, "it")
    assert tower == hearing_tower_of(PUBLISHED, "it")
    told, wanted = text_settings(own, tower), text_settings(PUBLISHED, tower)
    # what a published config leaves to generation_config.json
    left = ("bos_token_id", "eos_token_id", "pad_token_id", "attention_bias", "torch_dtype")
    assert {name: value for name, value in told.items() if name not in left} == {
        name: value for name, value in wanted.items() if name not in left
    }


def test_who_ties_the_head() -> None:
    """The whole config, and where it is silent the text's; transformers' own is that it is tied."""
    for whole, text, tied in ((None, None, True), (None, False, False), (True, False, True), (False, True, False)):
        inner = {name: value for name, value in TEXT.items() if name != "tie_word_embeddings"}
        inner |= {} if text is None else {"tie_word_embeddings": text}
        config = PUBLISHED | {"thinker_config": PUBLISHED["thinker_config"] | {"text_config": inner}}
        config |= {} if whole is None else {"tie_word_embeddings": whole}
        assert shape_of(config).tied is tied
        assert text_settings(config, hearing_tower_of(config, "it"))["tie_word_embeddings"] is tied


@pytest.mark.parametrize("thinker", [None, [], {"audio_config": AUDIO}, {"audio_config": AUDIO, "text_config": "x"}])
def test_a_thinker_that_is_none_is_refused(thinker: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot be right"):
        check_config(PUBLISHED | {"thinker_config": thinker}, QWEN3_ASR, "it")


def test_a_tokenizer_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(SourceError, match=r"vocab\.json is missing"):
        write_tokenizer(tmp_path, tmp_path / "out")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(SourceError, match=r"merges\.txt"):
        write_tokenizer(tmp_path, tmp_path / "out")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nb c\n")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"no tokenizer can be made of vocab\.json"):
        write_tokenizer(tmp_path, tmp_path / "out")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.json").write_text("[1]")
    with pytest.raises(SourceError, match="not a JSON object"):
        write_tokenizer(tmp_path, tmp_path / "out")
    (tmp_path / "chat_template.json").write_text('{"chat_template": 1}')
    with pytest.raises(SourceError, match="holds no template"):
        write_tokenizer(tmp_path, tmp_path / "out")
