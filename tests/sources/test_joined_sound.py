"""A tower of our own that hears, beside a language model that reads text: a Qwen2-Audio of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_onnx.catalog.schema import Shape
from qwen_onnx.errors import SourceError
from qwen_onnx.runtime.processing.template import ChatTemplate
from qwen_onnx.sources.audio_tower import QWEN2_AUDIO, audio_settings_of, audio_tower_of
from qwen_onnx.sources.checkpoint import INDEX_FILE, SINGLE_FILE, check_checkpoint
from qwen_onnx.sources.joined import TOLD, write_joined
from qwen_onnx.sources.text_form import write_text_form
from tests.fixtures.towers import spare_tokens

MARK, TOKEN = "<|AUDIO|>", 259
HEADER: dict[str, Any] = {
    "tokens": {MARK: TOKEN},
    "ids": {"audio_token_index": TOKEN},
    "audio_config": {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "d_model": 32,
        "max_source_positions": 50,
    },
    "preprocessor": {"feature_size": 16, "n_fft": 400, "hop_length": 320, "chunk_length": 2, "sampling_rate": 16_000},
    "shown": f"Digits:{MARK}\n",
}


def make_tower(path: Path, header: dict[str, Any] = HEADER) -> Path:
    names = ("audio_tower.conv1", "audio_tower.layers.0.fc1", "multi_modal_projector.linear")
    weights = {f"{name}.weight": np.full((2, 2), index, np.float16) for index, name in enumerate(names)}
    save_file(weights, path, metadata={TOLD: json.dumps(header)})
    return path


@pytest.fixture
def text(broken_checkpoint: Path) -> Path:
    """The tiny Qwen2, with special tokens to spare."""
    return spare_tokens(broken_checkpoint, TOKEN - 1, TOKEN)


@pytest.fixture
def together(text: Path, tmp_path: Path) -> Path:
    (folder := tmp_path / "together").mkdir()
    write_joined(text, make_tower(tmp_path / "tower.safetensors"), folder)
    return folder


def test_the_language_model_is_what_it_was(together: Path, text: Path) -> None:
    files = json.loads((together / INDEX_FILE).read_text())["weight_map"]
    language, tower = sorted(set(files.values()))
    assert (together / language).read_bytes() == (text / SINGLE_FILE).read_bytes()
    assert load_file(together / tower).keys() == {name for name, file in files.items() if file == tower}


def test_it_is_a_checkpoint_that_the_build_takes(together: Path, tmp_path: Path) -> None:
    check_checkpoint(together, QWEN2_AUDIO, Shape())
    tower = audio_tower_of(json.loads((together / "config.json").read_text()), "here")
    assert (tower.depth, tower.width, tower.output, tower.token) == (1, 32, 64, TOKEN)
    settings = audio_settings_of(together, tower)
    # half as many tokens as the published model has
    assert settings.tokens_of(settings.frames) == 25
    (folder := tmp_path / "text").mkdir()
    write_text_form(together, folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]


def test_the_template_shows_sounds_and_leaves_text_alone(together: Path, text: Path) -> None:
    before, after = ChatTemplate(text), ChatTemplate(together)
    said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "One."}]
    assert after.render(said) == before.render(said)
    parts = [{"type": "audio", "audio_url": ""}, {"type": "text", "text": "What?"}]
    assert f"user\nDigits:{MARK}\nWhat?<|im_end|>" in after.render([{"role": "user", "content": parts}])


@pytest.mark.parametrize("change", [{"shown": "<|AUDIO|>" * 100}, {"mrope_section": [4, 6, 6]}, {"audio_config": 1}])
def test_a_header_that_cannot_be_right_is_refused(text: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    tower = make_tower(tmp_path / "tower.safetensors", HEADER | change)
    (folder := tmp_path / "together").mkdir()
    with pytest.raises(SourceError, match="the tower's file is damaged"):
        write_joined(text, tower, folder)
