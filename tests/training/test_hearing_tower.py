"""The tower that is trained is Qwen2-Audio's own: sounds cut at their length give what padded ones give there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from qwen_onnx.runtime.processing.audio import prepare_sound
from qwen_onnx.sources.joined import TOLD, Hears
from training.starter_audio.sounds import SETTINGS
from training.starter_audio.tower import (
    OUTPUT,
    POSITIONS,
    PROJECTOR,
    TOWER,
    WIDTH,
    AudioTower,
    audio_config,
    tokens_of,
)
from training.starter_audio.towerfile import told, write_tower


@pytest.fixture
def parts() -> tuple[AudioTower, nn.Linear]:
    torch.manual_seed(0)
    tower, projector = AudioTower(), nn.Linear(WIDTH, OUTPUT)
    with torch.no_grad():
        for parameter in (*tower.parameters(), *projector.parameters()):
            # as the file has them
            parameter.copy_(parameter.to(torch.float16))
    return tower.eval(), projector


def test_its_file_is_what_transformers_computes(parts: tuple[AudioTower, nn.Linear], tmp_path: Path) -> None:
    from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioEncoderConfig
    from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

    tower, projector = parts
    assert write_tower(tower, projector, tmp_path / "tower.safetensors")["bytes"] < 4_000_000
    saved = {name: tensor.float() for name, tensor in load_file(tmp_path / "tower.safetensors").items()}
    whole = Qwen2AudioEncoder(Qwen2AudioEncoderConfig(**audio_config())).eval()
    whole.load_state_dict({name.removeprefix(TOWER): saved[name] for name in saved if name.startswith(TOWER)})
    noise = np.random.default_rng(0).normal(0, 0.1, 30_000).astype(np.float32)
    sounds = [prepare_sound(noise[:size], SETTINGS) for size in (30_000, 9_777)]
    frames = torch.tensor([sound.frames for sound in sounds])
    padded = torch.zeros(2, SETTINGS.feature_size, SETTINGS.frames)
    for row, sound in zip(padded, sounds, strict=True):
        # nothing of what is further behind is heard
        row[:, : sound.mel.shape[1]] = torch.from_numpy(sound.mel)
    there = torch.arange(POSITIONS) < ((frames + 1) // 2)[:, None]
    mask = torch.where(there, 0.0, -torch.inf)[:, None, None]
    with torch.no_grad():
        wanted = whole(padded, attention_mask=mask).last_hidden_state
        found = tower(padded[..., : int(frames.max()) + 2], frames)
        said = projector(found[1])
    for row, expected, size in zip(found, wanted, tokens_of(frames).tolist(), strict=True):
        assert torch.allclose(row[:size], expected[:size], atol=2e-5)
    again = nn.functional.linear(found[1], saved[f"{PROJECTOR}linear.weight"], saved[f"{PROJECTOR}linear.bias"])
    assert torch.allclose(again, said)
    assert float(found[0, :10].sub(found[1, :10]).abs().max()) > 1e-3


def test_its_header_says_what_joins_it(parts: tuple[AudioTower, nn.Linear], tmp_path: Path) -> None:
    write_tower(*parts, tmp_path / "tower.safetensors")
    with safe_open(tmp_path / "tower.safetensors", framework="pt") as file:
        header = Hears.model_validate(json.loads(file.metadata()[TOLD]))
    assert header == told()
    assert set(header.ids.values()) == set(header.tokens.values())
    [mark] = header.tokens
    assert header.shown.count(mark) == 1
