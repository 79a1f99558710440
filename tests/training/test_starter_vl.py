"""The tower that the repository carries: the file of the recipe, and what it sees."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from benchmarks.live import LiveServer
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import make_plan
from qwen_onnx.catalog.sources import TowerFile, WheelSource
from qwen_onnx.errors import ChecksumError
from qwen_onnx.files import sha256_of
from qwen_onnx.sources import fetch as fetching
from qwen_onnx.sources import joined
from qwen_onnx.sources.streamed import tensors_of
from tests.fixtures.tools import REPOSITORY, run_cli
from training.starter_vl.exam import items
from training.starter_vl.language import IMAGE
from training.starter_vl.lora import ADAPTED, RANK
from training.starter_vl.pixels import SETTINGS, one_frame
from training.starter_vl.tower import FRAMES, VisionTower, weights
from training.starter_vl.towerfile import told

LAYERS, HIDDEN = 30, 576
PILLOWS = [""]


@pytest.fixture(scope="module")
def pinned() -> TowerFile:
    """What the recipe says of the tower."""
    [source] = make_plan(load_catalog(REPOSITORY), "starter-vl", "cpu").sources
    assert isinstance(source, WheelSource)
    assert source.tower is not None
    return source.tower


def test_the_committed_file_is_the_recipes(pinned: TowerFile) -> None:
    path = joined.TOWERS / pinned.file
    assert sha256_of(path) == pinned.sha256
    assert path.stat().st_size <= 8_000_000
    shapes = {name: entry.shape for name, entry in tensors_of([path]).items()}
    with safe_open(path, framework="pt") as file:
        header = joined.Sees.model_validate_json(file.metadata()[joined.TOLD])
    assert header == told()
    visual = {name: tuple(tensor.shape) for name, tensor in weights(VisionTower()).items()}
    assert visual == {name: shape for name, shape in shapes.items() if name.startswith(joined.VISUAL)}
    taught = {name: shape for name, shape in shapes.items() if name not in visual}
    assert len(taught) == LAYERS * len(ADAPTED) * 2
    assert all(RANK in shape and max(shape) <= HIDDEN for shape in taught.values())


def test_a_byte_that_was_altered_is_refused(pinned: TowerFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(joined.TOWERS / pinned.file, tmp_path / pinned.file)
    with (tmp_path / pinned.file).open("r+b") as file:
        file.seek(-1, io.SEEK_END)
        [last] = file.read(1)
        file.seek(-1, io.SEEK_END)
        file.write(bytes([last ^ 1]))
    monkeypatch.setattr(joined, "TOWERS", tmp_path)
    text = fetching.Checkpoint(path=tmp_path, origin="here", revision="0" * 64, files={})
    with pytest.raises(ChecksumError, match="is not the tower of the recipe"):
        fetching._joined(text, pinned, tmp_path / "cache", print)


@pytest.mark.slow
def test_it_names_what_ten_unseen_pictures_show(starter_checkpoint: Path, pinned: TowerFile, tmp_path: Path) -> None:
    """Of the checkpoint, in PyTorch; the INT4 artifact is asked below."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    (folder := tmp_path / "whole").mkdir()
    joined.write_joined(starter_checkpoint, joined.TOWERS / pinned.file, folder)
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    right = 0
    for item in items(10, PILLOWS):
        frame = torch.from_numpy(one_frame(Image.open(io.BytesIO(item.png)).convert("RGB")))
        side = int(len(frame) ** 0.5)
        pixels = frame.view(len(frame), 3, 1, -1).expand(-1, -1, FRAMES, -1).reshape(len(frame), -1)
        content = [{"type": "image"}, {"type": "text", "text": item.asked.question}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        text = text.replace("<|image_pad|>", "<|image_pad|>" * (len(frame) // SETTINGS.merge_size**2))
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == IMAGE).long(),
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, side, side]]),
            max_new_tokens=12,
            do_sample=False,
        )
        right += item.asked.is_right(tokenizer.decode(found[0, ids.shape[1] :]))
    assert right >= 9


@pytest.mark.release
def test_the_int4_artifact_names_them_over_http(tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    built = run_cli("optimize", "starter-vl", "--output", artifact)
    assert built.returncode == 0, built.stderr
    with LiveServer("qwen_onnx.cli.app", ["serve", str(artifact)]) as server:
        asked = [sys.executable, "-m", "training.starter_vl.exam", server.url, "--pictures", "40", "--least", "0.9"]
        done = subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["pictures"] == 40
