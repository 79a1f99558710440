"""The streamed teacher computes what PyTorch computes with the whole model in memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen_onnx.errors import VerificationError
from qwen_onnx.export.weights import CheckpointWeights
from qwen_onnx.sources.qwen1 import write_qwen2_form
from qwen_onnx.verify.answers import Answers, _batches
from qwen_onnx.verify.teacher import Teacher
from tests.fixtures.architectures import MAKERS, make_checkpoint
from tests.fixtures.qwen1 import make_qwen1_checkpoint

RANDOM = np.random.default_rng(0)
# two of one length share a batch
TEXTS = [RANDOM.integers(2, 256, length).tolist() for length in (90, 90, 37, 2)]
LIMIT = 1e-5


@torch.inference_mode()
def unstreamed(checkpoint: Path, ids: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return np.asarray(model(torch.tensor([ids]), use_cache=False).logits[0])


def assert_equal(checkpoint: Path, scratch: Path) -> None:
    answers = Answers(Teacher(checkpoint, threads=1), scratch)
    answers.prepare(TEXTS)
    for ids in TEXTS:
        wanted = unstreamed(checkpoint, ids)
        assert wanted.std() > 0.01
        assert np.abs(answers.logits(ids) - wanted).max() <= LIMIT


@pytest.fixture(params=[*MAKERS, "QWenLMHeadModel"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    if request.param in MAKERS:
        return make_checkpoint(request.param, folder)
    folder.mkdir()
    write_qwen2_form(make_qwen1_checkpoint(tmp_path / "original"), folder)
    return folder


def test_every_architecture_equals_the_whole_model(checkpoint: Path, tmp_path: Path) -> None:
    assert_equal(checkpoint, tmp_path / "scratch")


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_in_shards_with_either_head(tiny_checkpoint: Path, tmp_path: Path, tied: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_equal(folder, tmp_path / "scratch")


def test_experts_that_are_stored_stacked(tmp_path: Path) -> None:
    """As Qwen3.5 publishes them; transformers saves one by one those of Qwen3-MoE."""
    folder = make_checkpoint("Qwen3MoeForCausalLM", tmp_path / "checkpoint")
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in CheckpointWeights(folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = {
            kind: torch.stack([tensors.pop(f"{prefix}.{index}.{kind}_proj.weight") for index in range(8)])
            for kind in ("gate", "up", "down")
        }
        tensors[f"{prefix}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        tensors[f"{prefix}.down_proj"] = parts["down"]
    answers = [Answers(Teacher(folder, threads=1), tmp_path / "one").logits(TEXTS[0])]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    answers.append(Answers(Teacher(folder, threads=1), tmp_path / "other").logits(TEXTS[0]))
    assert np.array_equal(*answers)


@contextmanager
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The layers that are passed meanwhile."""
    found: list[int] = []
    layer = Teacher.layer

    def noted(self: Teacher, index: int) -> Any:
        found.append(index)
        return layer(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "layer", noted)
        yield found


KILLED = """
import json, os, signal, sys
from pathlib import Path
from qwen_onnx.verify.answers import Answers
from qwen_onnx.verify.teacher import Teacher
layer = Teacher.layer
def killing(self, index):
    if index == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return layer(self, index)
Teacher.layer = killing
Answers(Teacher(Path(sys.argv[1]), 1), Path(sys.argv[2]), keep_every=0).prepare(json.loads(sys.argv[3]))
"""


@pytest.mark.slow
def test_a_killed_run_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scratch = make_checkpoint("Qwen3_5ForConditionalGeneration", tmp_path / "checkpoint"), tmp_path / "scratch"
    program = [sys.executable, "-c", KILLED, str(folder), str(scratch), json.dumps(TEXTS)]
    assert subprocess.run(program, check=False).returncode == -9
    damaged = Path(shutil.copytree(scratch, tmp_path / "damaged"))
    [kept] = damaged.rglob("layer-0003")
    kept.write_bytes(bytes([kept.read_bytes()[0] ^ 1]) + kept.read_bytes()[1:])
    other = make_checkpoint("Qwen3_5ForConditionalGeneration", tmp_path / "other", seed=1)
    for checkpoint, place, layers in (
        (folder, scratch, [3]),
        (folder, damaged, [0, 1, 2, 3]),
        (other, scratch, [0, 1, 2, 3]),
    ):
        with seen(monkeypatch) as passed:
            answers = Answers(Teacher(checkpoint, 1), place)
            answers.prepare(TEXTS)
        assert passed == layers
        assert np.abs(answers.logits(TEXTS[0]) - unstreamed(checkpoint, TEXTS[0])).max() <= LIMIT


def test_what_was_prepared_is_not_computed_again(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = Answers(Teacher(tiny_checkpoint, 1), tmp_path)
    answers.prepare(TEXTS)
    with seen(monkeypatch) as passed:
        answers.prepare(TEXTS[:2])
        first = answers.logits(TEXTS[0])
        assert np.array_equal(answers.logits(TEXTS[0]), first)
    assert passed == []


def broken(checkpoint: Path, change: Any) -> Path:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return checkpoint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("model.layers.1.self_attn.q_proj.bias"), "lacks self_attn.q_proj.bias"),
        (lambda found: found.update({"model.layers.1.self_attn.o_proj.bias": torch.zeros(64)}), "has self_attn.o_proj"),
        (lambda found: found.update({"model.norm.weight": torch.zeros(63)}), "lacks weight of the shape"),
        (lambda found: found.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(1, 64)}), "lacks mlp.up_proj"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    broken_checkpoint: Path, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(VerificationError, match=message):
        Answers(Teacher(broken(broken_checkpoint, change), 1), tmp_path / "scratch").prepare(TEXTS)


def test_a_model_that_transformers_does_not_know_is_refused(broken_checkpoint: Path) -> None:
    settings = json.loads((broken_checkpoint / "config.json").read_text())
    (broken_checkpoint / "config.json").write_text(json.dumps(settings | {"model_type": "qwen9"}))
    with pytest.raises(VerificationError, match="cannot load the checkpoint"):
        Teacher(broken_checkpoint, 1)


def test_batches_hold_texts_of_one_length_and_few_tokens() -> None:
    texts = [[1], [2, 3], [4, 5], *([[6] * 400] * 3)]
    found = [(rows.start, rows.stop, list(ids.shape)) for rows, ids in _batches(texts)]
    assert found == [(0, 1, [1, 1]), (1, 5, [2, 2]), (5, 805, [2, 400]), (805, 1205, [1, 400])]
