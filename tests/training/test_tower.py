"""The tower that is trained is Qwen2.5-VL's own, and its file holds what it computes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from qwen_onnx.sources.joined import TOLD, Sees
from training.starter_vl.pixels import batch
from training.starter_vl.questions import Asked, ask
from training.starter_vl.scenes import scene
from training.starter_vl.tower import DEPTH, FRAMES, OUTPUT, VisionTower, vision_config
from training.starter_vl.towerfile import write_tower


@pytest.fixture
def tower() -> VisionTower:
    torch.manual_seed(0)
    made = VisionTower()
    with torch.no_grad():
        for parameter in made.parameters():
            # as the file has them
            parameter.copy_(parameter.to(torch.float16))
    return made


def test_its_file_is_what_transformers_computes(tower: VisionTower, tmp_path: Path) -> None:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    told = write_tower(tower, nn.ModuleDict(), tmp_path / "tower.safetensors")
    assert told["bytes"] < 8_000_000
    whole = Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**vision_config())).eval()
    saved = load_file(tmp_path / "tower.safetensors")
    whole.load_state_dict({name.removeprefix("visual."): tensor.float() for name, tensor in saved.items()})
    pixels = batch([scene(1), scene(2)], [84, 130], [""])
    patches = pixels.shape[1]
    frames = pixels.view(2, patches, 3, 1, -1).expand(-1, -1, -1, FRAMES, -1).reshape(2 * patches, -1)
    side = int(patches**0.5)
    with torch.no_grad():
        wanted = whole(frames, torch.tensor([[1, side, side]] * 2)).pooler_output.view(2, -1, OUTPUT)
        found = tower(pixels)
    assert torch.allclose(found, wanted, atol=2e-5 * float(wanted.std()) + 1e-5)
    assert float(wanted[0].sub(wanted[1]).abs().max()) > 1e-3


def test_its_header_says_what_joins_it(tower: VisionTower, tmp_path: Path) -> None:
    write_tower(tower, nn.ModuleDict(), tmp_path / "tower.safetensors")
    with safe_open(tmp_path / "tower.safetensors", framework="pt") as file:
        told = Sees.model_validate(json.loads(file.metadata()[TOLD]))
    assert told.vision_config["depth"] == DEPTH
    assert set(told.ids.values()) == set(told.tokens.values())


def test_questions_of_one_picture_do_not_see_one_another() -> None:
    """A question is read as if it were asked alone: the mask lets it see its picture and itself."""
    from training.starter_vl.language import FORM, IMAGE, Language

    language = Language.__new__(Language)
    language._before = [0, 1]
    language._encode = lambda text: [50 + ord(letter) % 40 for letter in text]  # type: ignore[method-assign]
    asked = ask(scene(4), random.Random(0))
    assert len(asked) > 1
    read = language.branches([asked, [Asked("digit", "?", "7", "It is 7.")]])
    ids, seen = read.ids[0], read.mask[0, 0] == 0
    pictures = (ids == IMAGE).nonzero().flatten().tolist()
    first, second = pictures[:9], pictures[9:]
    last = len(ids) - 1
    assert seen[last, second].all()
    assert not seen[last, first].any()
    alone = language.branches([asked[:1]])
    size = alone.ids.shape[1]
    assert torch.equal(read.mask[0, 0, :size, :size], alone.mask[0, 0])
    # the system's message is seen by all
    assert seen[last, :2].all()
    # of an answer, the fact and the token behind it count most
    for target, weight in zip(alone.targets[0].tolist(), alone.weights[0].tolist(), strict=True):
        assert (weight > 0) == (target >= 0)
    assert {round(weight, 3) for weight in alone.weights[0].tolist()} == {0.0, FORM, 1.0}
    # the second question sees the picture, not the first one
    assert not seen[size, size - 1]
    assert seen[size, first].all()
    assert read.places[:, 0, size].tolist() == alone.places[:, 0, len(first) + 4].tolist()
