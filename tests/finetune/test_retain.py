"""What is retained: how far a model went from its base is measured rightly, held down, and told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.faq import lines
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import make_plan
from qwen_onnx.catalog.training import load_training
from qwen_onnx.errors import TrainingError
from qwen_onnx.finetune import estimate
from qwen_onnx.finetune.encode import Encoded, Rows
from qwen_onnx.finetune.job import finetune, prepare
from qwen_onnx.finetune.retain import batches, divergence
from tests.conftest import REPOSITORY
from tests.finetune.test_against import model_of
from tests.finetune.test_train import GENTLE, job_of

# what nobody teaches: of a model this small the change shows most in texts like its examples
KEPT = [
    {"retain": [{"role": "user", "content": f"Where is {number}?"}, {"role": "assistant", "content": "Here."}]}
    for number in range(12)
]


def _data(folder: Path, retained: Sequence[object]) -> Path:
    """Twenty examples, and lines to retain."""
    path = folder / "kept.jsonl"
    told = [*lines().splitlines()[:20], *map(json.dumps, retained)]
    path.write_text("".join(f"{line}\n" for line in told))
    return path


def _rows(*lengths: int) -> list[Encoded]:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 200, (length,), generator=draw).tolist() for length in lengths]
    return [Encoded(line, row, row) for line, row in enumerate(ids)]


@torch.no_grad()
def _apart(model: Any, rows: Sequence[Sequence[int]]) -> float:
    """The divergence by its definition, one row after the other."""
    total = 0.0
    for row in rows:
        ids = torch.tensor([list(row)])
        adapted = model(ids).logits.double().log_softmax(-1)
        with model.disable_adapter():
            base = model(ids).logits.double().log_softmax(-1)
        total += float((base.exp() * (base - adapted)).sum())
    return total


def test_the_divergence_is_that_of_every_next_token_from_the_base(tiny_checkpoint: Path) -> None:
    model = get_peft_model(model_of(tiny_checkpoint), LoraConfig(r=4, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    rows = [row.ids for row in _rows(300, 20, 1)]
    assert divergence(model, rows).item() == pytest.approx(0, abs=1e-4)
    for name, weights in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weights, std=0.5, generator=torch.Generator().manual_seed(1))
    found = divergence(model, rows)
    assert found.item() == pytest.approx(_apart(model, rows), rel=1e-3)
    assert found.item() > 0.1
    found.backward()
    moved = {name for name, weights in model.named_parameters() if weights.grad is not None and weights.grad.any()}
    assert moved
    assert all(".lora_" in name for name in moved)


def test_batches_hold_every_row_once_and_no_more_tokens_than_they_may() -> None:
    rows = _rows(60, 10, 12, 64, 30, 30, 11, 9, 100)
    found = batches(rows, 64, seed=3)
    assert sorted(row for batch in found for row in batch) == sorted(row.ids for row in rows)
    assert all(len(batch) * max(map(len, batch)) <= 64 for batch in found if len(batch) > 1)
    assert len(found) == 5
    assert batches(rows, 64, seed=3) == found != batches(rows, 64, seed=4)


def test_retained_rows_cost_time_and_none_of_them_costs_none(tiny_checkpoint: Path) -> None:
    training = load_training(REPOSITORY, overrides=["window=64", "epochs=2"])
    plan = make_plan(load_catalog(REPOSITORY), "starter", "cpu")
    examples, texts = _rows(*[32] * 10), _rows(*[64] * 4)
    plain, more = (
        estimate.cost(plan, tiny_checkpoint, rows, training, "cpu", in_bf16=False)
        for rows in (Rows(examples, examples), Rows(examples, examples, texts, texts[:1]))
    )
    assert (plain.retained, more.retained) == (0, 5 * 64)
    assert plain.steps == more.steps == 10
    assert more.memory > plain.memory
    # of retained rows no more is read than there is
    few = estimate.cost(plan, tiny_checkpoint, Rows(examples, examples, _rows(10), texts[:1]), training, "cpu", False)
    assert few.retained == 5 * 10


@pytest.mark.slow
def test_what_is_retained_is_held_and_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = _data(tmp_path, KEPT)
    found = {}
    for weight in (1e-6, 30):
        job = job_of(data, tiny_checkpoint, tmp_path / str(weight), *GENTLE, f"retain={weight}")
        found[weight] = finetune(job, prepare(job))
    (free, _), (held, folder) = found.values()
    for report in (free, held):
        assert report.manifest.verdict == "PASS"
        assert report.manifest.retained is not None
        assert (report.manifest.retained.rows, report.manifest.retained.held_out) == (len(KEPT), 1)
        # the loss is that of the examples alone, whatever the divergence counts
        assert report.manifest.loss_before == free.manifest.loss_before
        assert [step for step, _ in report.divergences] == [step for step, _ in report.held_out[1:]]
    assert held.manifest.retained.divergence < 0.3 * free.manifest.retained.divergence
    assert held.manifest.loss_after > free.manifest.loss_after
    assert f"diverges by {held.manifest.retained.divergence:.3g} nats per token" in held.claim
    assert "Divergence of retained rows" in (folder / "report.html").read_text()
    line = json.loads(held.json_line(folder))
    assert line["divergence"] == held.manifest.retained.divergence
    # each batch read as many tokens of both, and both were counted
    assert held.manifest.tokens > free.manifest.steps


def test_one_text_cannot_be_both_held_and_held_out(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = _data(tmp_path, KEPT[:1])
    with pytest.raises(TrainingError, match="none left to learn from"):
        prepare(job_of(data, tiny_checkpoint, tmp_path))
