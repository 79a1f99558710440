"""A tower of our own beside a language model that reads text: a Qwen2.5-VL of both, a LoRA merged if it has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_onnx.catalog.schema import Shape
from qwen_onnx.errors import ChecksumError, SourceError, UnsupportedModelError
from qwen_onnx.files import sha256_of
from qwen_onnx.runtime.processing.template import ChatTemplate
from qwen_onnx.sources import fetch as fetching
from qwen_onnx.sources import joined
from qwen_onnx.sources.checkpoint import INDEX_FILE, SINGLE_FILE, check_checkpoint
from qwen_onnx.sources.joined import TEMPLATE, TOLD, write_joined
from qwen_onnx.sources.text_form import write_text_form
from qwen_onnx.sources.vision_config import QWEN2_5_VL, preparation_of, tower_of
from tests.fixtures.towers import spare_tokens

MARKERS = {"<|vision_start|>": 258, "<|image_pad|>": 259, "<|vision_end|>": 260, "<|video_pad|>": 261}
IDS = {"vision_start_token_id": 258, "image_token_id": 259, "vision_end_token_id": 260, "video_token_id": 261}
HEADER: dict[str, Any] = {
    "mrope_section": [4, 6, 6],
    "tokens": MARKERS,
    "ids": IDS,
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 32,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [0],
    },
    "preprocessor": {"min_pixels": 3136, "max_pixels": 12544, "patch_size": 14, "merge_size": 2},
}


def make_tower(path: Path, header: dict[str, Any] = HEADER, taught: dict[str, Any] | None = None) -> Path:
    names = ("patch_embed.proj", "blocks.0.attn.qkv", "merger.mlp.0", "merger.mlp.2")
    weights = {f"visual.{name}.weight": np.full((2, 2), index, np.float16) for index, name in enumerate(names)}
    save_file(weights | (taught or {}), path, metadata={TOLD: json.dumps(header)})
    return path


QUERY = "model.layers.1.self_attn.q_proj"


def low_rank(rank: int = 2, inner: int = 64, outer: int = 64, module: str = QUERY) -> dict[str, Any]:
    """A and B of one matrix as a tower's file has them; dyadic, so that no product rounds."""
    draw = np.random.default_rng(0)
    return {
        f"base_model.model.{module}.lora_A.weight": (draw.integers(-8, 8, (rank, inner)) / 16).astype(np.float16),
        f"base_model.model.{module}.lora_B.weight": (draw.integers(-8, 8, (outer, rank)) / 16).astype(np.float16),
    }


@pytest.fixture
def text(broken_checkpoint: Path) -> Path:
    """The tiny Qwen2, whose tokenizer has special tokens to spare."""
    return spare_tokens(broken_checkpoint, *MARKERS.values())


@pytest.fixture
def together(text: Path, tmp_path: Path) -> Path:
    (folder := tmp_path / "together").mkdir()
    write_joined(text, make_tower(tmp_path / "tower.safetensors"), folder)
    return folder


def test_weights_of_both_sides_are_what_they_were(together: Path, text: Path) -> None:
    files = json.loads((together / INDEX_FILE).read_text())["weight_map"]
    language, tower = sorted(set(files.values()))
    assert (together / language).read_bytes() == (text / SINGLE_FILE).read_bytes()
    assert load_file(together / tower).keys() == {name for name, file in files.items() if file == tower}
    assert all(name.startswith("visual.") for name in load_file(together / tower))


def test_a_lora_in_its_file_is_merged_and_nothing_else_changes(text: Path, tmp_path: Path) -> None:
    taught = low_rank()
    tower = make_tower(tmp_path / "tower.safetensors", HEADER | {"rank": 2}, taught)
    (folder := tmp_path / "together").mkdir()
    write_joined(text, tower, folder)
    check_checkpoint(folder, QWEN2_5_VL, Shape())
    before, (language, seen) = load_file(text / SINGLE_FILE), (load_file(folder / part) for part in joined.PARTS)
    a, b = (value.astype(np.float32) for value in taught.values())
    assert np.array_equal(language[f"{QUERY}.weight"], before[f"{QUERY}.weight"] + b @ a)
    assert language.keys() == before.keys()
    for name in before.keys() - {f"{QUERY}.weight"}:
        assert np.array_equal(language[name], before[name])
    assert seen.keys() == load_file(tower).keys() - taught.keys()
    listed = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    assert set(listed) == set(language) | set(seen)
    # what was merged on the way is gone
    assert not list(tmp_path.glob(".merged-*"))


@pytest.mark.parametrize(
    ("rank", "taught", "message"),
    [
        (2, {name: value for name, value in low_rank().items() if "lora_A" in name}, "has A or B alone"),
        (4, low_rank(), "its config says rank 4"),
        (None, low_rank(), "its config says rank 0"),
        (2, {}, "it holds no weights"),
        (2, low_rank(inner=32), "the adapter is for"),
        (2, low_rank(module="model.layers.99.self_attn.q_proj"), "has 0 matrices for the adapter's"),
        (2, {"lm_head.weight": np.zeros((2, 2), np.float16)}, "is not A or B of a matrix"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(
    text: Path, tmp_path: Path, rank: int | None, taught: dict[str, Any], message: str
) -> None:
    tower = make_tower(tmp_path / "tower.safetensors", HEADER | {"rank": rank}, taught)
    (folder := tmp_path / "together").mkdir()
    with pytest.raises(UnsupportedModelError, match=message):
        write_joined(text, tower, folder)


def test_it_is_a_checkpoint_that_the_build_takes(together: Path, tmp_path: Path) -> None:
    check_checkpoint(together, QWEN2_5_VL, Shape())
    config = json.loads((together / "config.json").read_text())
    tower = tower_of(config, "here")
    assert (tower.depth, tower.width, tower.output, tower.sections) == (1, 32, 64, (4, 6, 6))
    assert (tower.image_token, tower.vision_start) == (259, 258)
    assert preparation_of(together, tower).max_pixels == 12544
    (folder := tmp_path / "text").mkdir()
    write_text_form(together, folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]


def test_spare_tokens_stand_for_pictures_and_text_is_what_it_was(together: Path, text: Path) -> None:
    from tokenizers import Tokenizer

    before, after = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (text, together))
    assert {name: after.token_to_id(name) for name in MARKERS} == MARKERS
    assert after.token_to_id("<spare_259>") is None
    sentence = "<|im_start|>user\nWhere is the star?<|im_end|>"
    assert after.encode(sentence).ids == before.encode(sentence).ids


def test_the_template_shows_pictures_and_leaves_text_alone(together: Path, text: Path) -> None:
    before, after = ChatTemplate(text), ChatTemplate(together)
    said = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Left"}]
    assert after.render(said) == before.render(said)
    parts = [{"type": "image"}, {"type": "text", "text": "Where?"}]
    found = after.render([{"role": "user", "content": parts}])
    assert "user\n<|vision_start|><|image_pad|><|vision_end|>Where?<|im_end|>" in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": {"<|image_pad|>": 40}}, "40 is not a special token"),
        ({"mrope_section": [4, 6]}, "the tower's file is damaged"),
        ({"colour": "red"}, "the tower's file is damaged"),
    ],
)
def test_a_header_that_cannot_be_right_is_refused(
    text: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    tower = make_tower(tmp_path / "tower.safetensors", HEADER | change)
    (folder := tmp_path / "together").mkdir()
    with pytest.raises(SourceError, match=message):
        write_joined(text, tower, folder)


def test_a_template_of_another_form_is_refused(text: Path, tmp_path: Path) -> None:
    (text / TEMPLATE).write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (folder := tmp_path / "together").mkdir()
    with pytest.raises(SourceError, match="the chat template does not mention"):
        write_joined(text, make_tower(tmp_path / "tower.safetensors"), folder)


@pytest.mark.parametrize("damage", [lambda content: content[:40], lambda content: b"\xff" * len(content)])
def test_a_damaged_file_is_refused(text: Path, tmp_path: Path, damage: Any) -> None:
    tower = make_tower(tmp_path / "tower.safetensors")
    tower.write_bytes(damage(tower.read_bytes()))
    (folder := tmp_path / "together").mkdir()
    with pytest.raises(SourceError, match="the tower's file is damaged"):
        write_joined(text, tower, folder)


def test_a_tower_with_another_digest_than_the_recipes_is_refused(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = make_tower(tmp_path / "tower.safetensors")
    monkeypatch.setattr(joined, "TOWERS", tmp_path)
    files = fetching.folder_checksums(text)
    plain = fetching.Checkpoint(path=text, origin="here", revision="0" * 64, files=files)
    told = fetching.TowerFile(file=tower.name, sha256=sha256_of(tower))
    made = fetching._joined(plain, told, tmp_path / "cache", print)
    assert made.revision != plain.revision
    assert fetching._joined(plain, told, tmp_path / "cache", print).path == made.path
    with tower.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ChecksumError, match="is not the tower of the recipe"):
        fetching._joined(plain, told, tmp_path / "cache", print)
