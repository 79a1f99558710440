"""Training on a tiny model: what the loss is, that it falls, when it stops, and what is left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks.faq import lines
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import make_plan
from qwen_onnx.catalog.training import load_training
from qwen_onnx.errors import EnvironmentFault, TrainingError, UnsupportedModelError
from qwen_onnx.files import sha256_of
from qwen_onnx.finetune import estimate, train
from qwen_onnx.finetune.encode import IGNORED, Encoded, Rows
from qwen_onnx.finetune.job import FinetuneJob, finetune, prepare, require_place
from qwen_onnx.records import digest_of
from qwen_onnx.sources.adapter import CONFIG, MANIFEST, WEIGHTS, open_adapter
from qwen_onnx.sources.fetch import cache_root
from tests.conftest import REPOSITORY, run_cli
from tests.fixtures.models import byte_tokenizer

# a tiny model learns the form of an answer, and nothing else, within seconds
GENTLE = ("epochs=4", "rank=4", "learning_rate=1e-2", "warmup=0", "every=4")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "faq.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines().splitlines()[:20]))
    return path


def job_of(examples: Path, checkpoint: Path, folder: Path, *changes: str) -> FinetuneJob:
    return FinetuneJob(
        make_plan(load_catalog(REPOSITORY), "starter", "cpu"),
        load_training(REPOSITORY, overrides=changes),
        examples,
        folder / "adapters/faq",
        "faq",
        folder / "cache",
        checkpoint,
    )


@pytest.fixture(scope="module")
def trained(examples: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The job, its report and its folder."""
    job = job_of(examples, tiny_checkpoint, tmp_path_factory.mktemp("trained"), *GENTLE)
    return (job, *finetune(job, prepare(job)))


@pytest.mark.slow
def test_the_loss_falls_and_the_adapter_says_so(trained: Any) -> None:
    job, report, folder = trained
    assert report.manifest.loss_after < report.manifest.loss_before - 0.2
    assert folder == job.target
    found = open_adapter(folder)
    assert found.manifest is not None
    assert (found.name, found.rank, found.scale) == ("faq", 4, 8.0)
    assert found.manifest.data.sha256 == sha256_of(job.data)
    assert sorted(found.manifest.files) == [CONFIG, WEIGHTS, "report.html", "report.json"]
    assert len(found.tensors) == 2 * 4
    # nothing of this machine
    assert str(job.cache.parent) not in (folder / CONFIG).read_text() + (folder / MANIFEST).read_text()
    # what a finished training needed is gone
    assert not list((job.cache / "work").iterdir())


@pytest.mark.slow
def test_the_report_has_the_curve(trained: Any) -> None:
    _, report, folder = trained
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert "<script" not in page
    assert report.claim in page
    assert page.count('<circle class="dot"') == len(report.held_out)
    assert report.held_out[0] == (0, report.manifest.loss_before)
    assert [step for step, _ in report.curve] == list(range(1, report.manifest.steps + 1))
    line = json.loads(report.json_line(folder))
    assert (line["verdict"], line["best_step"]) == ("PASS", report.best)


@pytest.mark.slow
def test_a_part_of_the_change_is_kept_where_that_is_asked_for(
    trained: Any, examples: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    _, whole, folder = trained
    job = job_of(examples, tiny_checkpoint, tmp_path, *GENTLE, "strength=0.5")
    report, weak = finetune(job, prepare(job))
    assert (report.curve, report.held_out, report.best) == (whole.curve, whole.held_out, whole.best)
    full, half = (load_file(place / WEIGHTS) for place in (folder, weak))
    assert full.keys() == half.keys()
    for name, tensor in full.items():
        torch.testing.assert_close(half[name], tensor * 0.5 if ".lora_B." in name else tensor, atol=0, rtol=0)
    assert whole.manifest.loss_after < report.manifest.loss_after < report.manifest.loss_before
    assert any("strength 0.5: the held-out loss is" in note for note in report.notes)
    # what asks for the whole says nothing of it
    assert "strength" not in (folder / MANIFEST).read_text()


def test_packed_examples_do_not_see_each_other(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 200, (length,), generator=generator).tolist() for length in (30, 50, 20)]
    packed = [Encoded(line, ids, [IGNORED] * 10 + ids[10:]) for line, ids in enumerate(rows)]
    training = load_training(REPOSITORY, overrides=["window=128"])
    watch = train.Watch(1, lambda _: None)
    model = train._model(tiny_checkpoint, training)
    trainer = train._trainer(model, byte_tokenizer(), Rows(packed, packed), training, tmp_path, watch)
    assert len(trainer.eval_dataset) == 1
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    losses = [
        cross_entropy(model(torch.tensor([row.ids])).logits[0, :-1], torch.tensor(row.labels[1:]), reduction="sum")
        for row in packed
    ]
    expected = sum(loss.item() for loss in losses) / sum(len(ids) - 10 for ids in rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_checkpoint(
    examples: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    target, kept = tmp_path / "faq", tmp_path / "faq.stopped"
    wild = [part for change in ("alpha=10000", "rank=1", "learning_rate=1", "every=1") for part in ("--set", change)]
    places = ("--data", examples, "--source", tiny_checkpoint, "--output", target)
    done = run_cli("finetune", "starter", *places, *wild, "--set", "warmup=0")
    assert done.returncode == 13
    assert "became nan at step 2; the checkpoint of step 1 is kept" in done.stderr
    assert str(kept) in done.stderr
    assert "--set learning_rate=0.25" in done.stderr
    assert not target.exists()
    assert open_adapter(kept).manifest is None
    from safetensors.torch import load_file

    assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(kept / WEIGHTS).values())


@pytest.mark.slow
def test_a_training_that_does_not_help_is_rejected_and_ends_early(
    examples: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    gentle = [option for option in GENTLE if not option.startswith(("epochs", "every"))]
    job = job_of(examples, tiny_checkpoint, tmp_path, *gentle, "epochs=50", "every=1", "patience=2")
    ready = prepare(job)
    # an answer of a byte that no example has: whatever is learnt makes it less likely
    strange = max(set(range(2, 256)) - {token for row in ready.rows.learnt for token in row.ids})
    report, folder = finetune(
        job, replace(ready, rows=Rows(ready.rows.learnt, [Encoded(1, [strange] * 20, [strange] * 20)]))
    )
    assert report.manifest.verdict == "FAIL"
    assert folder.name == "faq.rejected"
    assert not job.target.exists()
    assert report.manifest.steps < 20
    assert any("early" in note for note in report.notes)
    with pytest.raises(UnsupportedModelError, match="its training ended with FAIL"):
        open_adapter(folder)
    with pytest.raises(TrainingError, match="something else"):
        require_place(folder.parent)


def test_what_cannot_fit_is_refused_before_it_starts(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Encoded(line, list(range(100)), [IGNORED] * 80 + list(range(80, 100))) for line in range(10)]
    training = load_training(REPOSITORY, overrides=GENTLE)
    plan = make_plan(load_catalog(REPOSITORY), "starter", "cpu")
    found = estimate.cost(plan, tiny_checkpoint, Rows(rows, rows[:1]), training, "cpu", in_bf16=False)
    assert (found.examples, found.tokens, found.answers, found.steps) == (10, 1000, 200, 4 * 2)
    longer = training.model_copy(update={"window": 4096, "batch": 8})
    more = estimate.cost(plan, tiny_checkpoint, Rows(rows, rows[:1]), longer, "cpu", in_bf16=False)
    assert more.memory > found.memory
    estimate.require_fit(found, "starter")
    monkeypatch.setattr(estimate, "free_memory", lambda device: 10**8)
    with pytest.raises(EnvironmentFault, match=r"needs about 0\.\d GB of memory, 0\.1 GB are free") as caught:
        estimate.require_fit(found, "starter")
    assert "--set gradient_checkpointing=true" in str(caught.value.hint)


def test_a_window_beyond_the_context_is_refused_before_anything_is_fetched(examples: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the model takes 8,192"):
        prepare(job_of(examples, tmp_path / "nowhere", tmp_path, "window=10000"))


@pytest.mark.slow
def test_the_number_of_trained_weights_is_that_of_the_adapter(trained: Any, tiny_checkpoint: Path) -> None:
    job, _, folder = trained
    from safetensors.torch import load_file

    config = json.loads((tiny_checkpoint / "config.json").read_text())
    numbers = sum(tensor.numel() for tensor in load_file(folder / WEIGHTS).values())
    assert estimate.trained_numbers(config, job.training) == numbers


@pytest.mark.release
def test_a_killed_training_goes_on_and_comes_to_the_same_adapter(
    examples: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    # with texts to retain, whose turn depends on the step
    data = tmp_path / "kept.jsonl"
    kept = "".join(
        json.dumps({"retain": f"Rain falls {number} times. {'Then snow. ' * number}"}) + "\n" for number in range(30)
    )
    data.write_text(examples.read_text() + kept)

    def command(name: str) -> list[str]:
        places = ("--data", str(data), "--source", str(tiny_checkpoint), "--output", str(tmp_path / name / "faq"))
        changes = [part for change in (*GENTLE, "epochs=30") for part in ("--set", change)][2:]
        return ["finetune", "starter", *places, *changes, "--set", "patience=99", "--json"]

    whole = run_cli(*command("whole"))
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "qwen_onnx.cli.app", *command("killed")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    place = f"{digest_of(str(tmp_path / 'killed/faq'))[:12]}-*/checkpoint-16/trainer_state.json"
    work = cache_root(REPOSITORY) / "work"
    _wait(lambda: any(work.glob(place)) or process.poll() is not None)
    assert process.poll() is None, process.stderr and process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed/faq").exists()
    again = run_cli(*command("killed"))
    assert again.returncode == 0, again.stderr
    assert "going on from step" in again.stderr
    one, other = (json.loads(done.stdout.splitlines()[-1]) for done in (whole, again))
    assert (one["loss_before"], one["loss_after"]) == (other["loss_before"], other["loss_after"])
    assert sha256_of(tmp_path / "whole/faq" / WEIGHTS) == sha256_of(tmp_path / "killed/faq" / WEIGHTS)


def _wait(ready: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)
