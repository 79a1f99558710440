"""The job: checkpoint → examples → ids → training → adapter, which appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_onnx.artifact.code import code_digest
from qwen_onnx.artifact.store import build_lock, kept_folder, put_in_place, rejected_place, staging_folder
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.catalog.training import Training
from qwen_onnx.errors import EnvironmentFault, TrainingError, VerificationError
from qwen_onnx.files import file_checksums
from qwen_onnx.finetune.data import Data, read_data
from qwen_onnx.finetune.encode import Rows, encode, encode_retained, split
from qwen_onnx.finetune.estimate import LESS, Cost, cost, require_fit
from qwen_onnx.processes.progress import progress
from qwen_onnx.records import Verdict, digest_of
from qwen_onnx.sources.adapter import (
    CONFIG,
    MANIFEST,
    WEIGHTS,
    AdapterBase,
    AdapterData,
    AdapterManifest,
    AdapterRetained,
)
from qwen_onnx.sources.fetch import Checkpoint, fetch, weights_digest

if TYPE_CHECKING:
    from qwen_onnx.finetune.against import Against
    from qwen_onnx.finetune.report import TrainingReport
    from qwen_onnx.finetune.train import Trained
    from qwen_onnx.verify.baseline import CheckpointTokenizer

CODE = tuple(f"qwen_onnx.finetune.{name}" for name in ("train", "retain", "encode", "data"))
STOPPED = ".stopped"


@dataclass(frozen=True)
class FinetuneJob:
    """What to train and where.

    Attributes:
        target: folder of the adapter; ``name``, what models with it are called.
        source: local checkpoint instead of the recipe's sources.
        against: folder of the artifact whose weights are trained on instead of the checkpoint's.
        wait: wait when another process trains the same adapter.
    """

    plan: Plan
    training: Training
    data: Path
    target: Path
    name: str
    cache: Path
    source: Path | None = None
    against: Path | None = None
    wait: bool = True


@dataclass(frozen=True)
class Prepared:
    """What a training starts with: everything that can be refused was."""

    checkpoint: Checkpoint
    tokenizer: Any
    data: Data
    rows: Rows
    notes: list[str]
    cost: Cost
    in_bf16: bool
    against: Against | None = None

    @property
    def base(self) -> str:
        """Digest of the weights that the adapter belongs to."""
        return weights_digest(self.checkpoint.files)


def prepare(job: FinetuneJob) -> Prepared:
    """Everything but the training.

    Raises:
        TrainingError: nothing can be learnt from the examples; they are read before the weights are fetched.
        SourceError: the weights cannot be had.
        ArtifactError: there is no artifact to train against, or it has no slots.
        EnvironmentFault: peft or trl is not installed, or the memory does not hold the training.
    """
    require_packages()
    require_place(job.target)
    data, training = read_data(job.data), job.training
    if training.window > job.plan.context:
        what = f"a window of {training.window:,} tokens, the model takes {job.plan.context:,}"
        raise TrainingError(what, where=job.plan.model, hint=f"--set window={job.plan.context}")
    against = _against(job)
    checkpoint = fetch(job.plan, job.cache, local=job.source, progress=progress)
    if against:
        against.require_base(weights_digest(checkpoint.files))
    from qwen_onnx.finetune.train import device_of
    from qwen_onnx.verify.baseline import CheckpointTokenizer

    truth = CheckpointTokenizer(checkpoint.path)
    if not truth.chats:
        raise TrainingError(
            "the model has no chat template, so nothing says where an answer begins",
            where=job.plan.model,
            hint="choose a chat model: qwen-onnx list",
        )
    rows, notes = _rows(data, job, truth)
    device, in_bf16 = device_of(training)
    apart = against is not None and against.parts_tables
    found = cost(job.plan, checkpoint.path, rows, training, device, in_bf16, tables_apart=apart)
    require_fit(found, job.plan.asked)
    return Prepared(checkpoint, truth.tokenizer, data, rows, notes, found, in_bf16, against)


def _rows(data: Data, job: FinetuneJob, truth: CheckpointTokenizer) -> tuple[Rows, list[str]]:
    """Ids of all lines, a share of the examples and of what is retained held out; and what is to be told of them."""
    training, render = job.training, _told(truth.render)
    encoded, notes = encode(
        data.examples, render, truth.tokenizer, window=training.window, longer=training.longer, path=job.data
    )
    found = split(encoded, training.held_out, training.seed, job.data)
    if not data.retained:
        return Rows(*found), notes
    kept = encode_retained(data.retained, render, truth.tokenizer, window=training.window, path=job.data)
    return Rows(*found, *split(kept, training.held_out, training.seed, job.data)), notes


def _against(job: FinetuneJob) -> Against | None:
    if job.against is None:
        return None
    from qwen_onnx.finetune.against import open_against

    return open_against(job.against, job.training)


def _told(render: Callable[..., str]) -> Callable[..., str]:
    """A template that refuses an example is a fault of that example."""

    def rendered(messages: Any, *, prompt: bool = False) -> str:
        try:
            return render(messages, prompt=prompt)
        except VerificationError as error:
            raise TrainingError(error.what) from error

    return rendered


def require_packages() -> None:
    """EnvironmentFault when the extra is not installed, or more than one process or GPU would train."""
    missing = [name for name in ("torch", "peft", "trl", "accelerate", "datasets") if find_spec(name) is None]
    if missing:
        raise EnvironmentFault(f"not installed: {', '.join(missing)}", hint="pip install 'qwen-onnx[finetune]'")
    import torch

    if os.environ.get("WORLD_SIZE", "1") != "1" or torch.cuda.device_count() > 1:
        raise EnvironmentFault(
            "several processes or GPUs: one process on one GPU trains",
            hint="CUDA_VISIBLE_DEVICES=0 qwen-onnx finetune …",
        )


def require_place(target: Path) -> None:
    """TrainingError when something other than an adapter is where the adapter goes: it would be replaced."""
    if target.exists() and not (target / MANIFEST).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise TrainingError("there is something else", where=str(target), hint="--output FOLDER for another place")


def finetune(job: FinetuneJob, ready: Prepared) -> tuple[TrainingReport, Path]:
    """Train and publish the adapter; one whose held-out loss did not fall goes beside it, as ``.rejected``.

    Returns:
        The report, and the folder that it is in.

    Raises:
        TrainingError: the loss became NaN; what was saved before is beside the target, as ``.stopped``.
    """
    from qwen_onnx.finetune.report import versions

    told = [job.training.model_dump(), ready.data.sha256, ready.base, job.name, versions(), code_digest(CODE)]
    key = digest_of([*told, ready.against.host.graph] if ready.against else told)
    waiting = "another process trains this adapter: waiting"
    with (
        build_lock(job.target, wait=job.wait, waiting=lambda: progress(waiting)),
        kept_folder(job.cache, key, job.target) as work,
        staging_folder(job.target) as staging,
    ):
        return _trained(job, ready, work, staging)


def _trained(job: FinetuneJob, ready: Prepared, work: Path, staging: Path) -> tuple[TrainingReport, Path]:
    from torch import OutOfMemoryError

    from qwen_onnx.finetune.report import TrainingReport, machine
    from qwen_onnx.finetune.train import NotFiniteError, last_good, train

    folder = staging / "adapter"
    folder.mkdir()
    try:
        done = train(
            ready.checkpoint.path, ready.tokenizer, ready.rows, job.training, work, folder, progress, ready.against
        )
    except NotFiniteError as error:
        raise _stopped(error, job, last_good(work), folder) from error
    except OutOfMemoryError as error:
        raise EnvironmentFault(f"the memory of the {ready.cost.device} is full", hint=LESS) from error
    _plain(folder, job.plan)
    manifest = _manifest(job, ready, done)
    told = ["training stopped early: the held-out loss no longer fell"] if done.stopped else []
    if job.training.strength < 1:
        told += [
            f"strength {job.training.strength:g}: the held-out loss is {done.kept:.4g} with that share of the change"
        ]
    report = TrainingReport(
        manifest=manifest,
        device=f"{ready.cost.device}, {'bf16' if ready.in_bf16 else 'fp32'}",
        curve=done.curve,
        held_out=done.held_out,
        divergences=done.divergences,
        best=done.best,
        notes=(*ready.notes, *told),
        environment=machine(),
    )
    report.save(folder)
    whole = manifest.model_copy(update={"files": file_checksums(folder, without=MANIFEST)})
    (folder / MANIFEST).write_text(whole.model_dump_json(indent=1) + "\n", encoding="utf-8")
    passed = manifest.verdict is Verdict.PASS
    target = job.target if passed else rejected_place(job.target)
    put_in_place(folder, target)
    return report, target


def _manifest(job: FinetuneJob, ready: Prepared, done: Trained) -> AdapterManifest:
    """Of the adapter, before its files are listed."""
    from qwen_onnx.finetune.report import versions

    before, kept = done.held_out[0][1], done.kept
    checkpoint, rows = ready.checkpoint, ready.rows
    held, out = len(rows.held_out), len(rows.retained_out)
    return AdapterManifest(
        name=job.name,
        verdict=Verdict.PASS if kept < before else Verdict.FAIL,
        base=AdapterBase(
            model=job.plan.model, origin=checkpoint.origin, revision=checkpoint.revision, weights=ready.base
        ),
        against=ready.against.told if ready.against else None,
        data=AdapterData(sha256=ready.data.sha256, examples=len(rows.learnt) + held, held_out=held),
        retained=None
        if done.divergence is None
        else AdapterRetained(rows=len(rows.retained) + out, held_out=out, divergence=done.divergence),
        training=job.training,
        loss_before=before,
        loss_after=kept,
        steps=done.steps,
        tokens=max(done.tokens, 1),
        seconds=done.seconds,
        packages=versions(),
        files={},
    )


def _plain(folder: Path, plan: Plan) -> None:
    """Leave peft's two files alone, and in its config nothing of this machine and nothing that a hash orders."""
    for path in folder.iterdir():
        if path.name not in (CONFIG, WEIGHTS):
            path.unlink()
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    named = {"base_model_name_or_path": plan.asked, "target_modules": sorted(config["target_modules"])}
    (folder / CONFIG).write_text(json.dumps(config | named, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _stopped(error: TrainingError, job: FinetuneJob, good: Path | None, folder: Path) -> TrainingError:
    """The error for a loss that is not a number, behind which the last good checkpoint is kept."""
    hint = f"train more gently: --set learning_rate={job.training.learning_rate / 4:g}"
    if good is None:
        return TrainingError(error.what, where="before the first checkpoint", hint=hint)
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(good / name, folder / name)
    _plain(folder, job.plan)
    place = job.target.with_name(job.target.name + STOPPED)
    put_in_place(folder, place)
    step = good.name.rpartition("-")[2]
    return TrainingError(f"{error.what}; the checkpoint of step {step} is kept", where=str(place), hint=hint)
