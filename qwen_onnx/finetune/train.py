"""Training itself: peft's LoRA in trl's SFTTrainer, from the last whole checkpoint where there is one."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from qwen_onnx.catalog.training import Training
from qwen_onnx.errors import SourceError, TrainingError
from qwen_onnx.finetune.encode import Rows
from qwen_onnx.finetune.estimate import duration
from qwen_onnx.sources.adapter import WEIGHTS

if TYPE_CHECKING:
    from qwen_onnx.finetune.against import Against

STATE = "trainer_state.json"
# seconds between two lines of progress
EVERY = 5.0
# in the log, of retained rows: how far the adapted model is from the base, and the sum of both terms
DIVERGENCE, JUDGED = "divergence", "objective"
Curve = tuple[tuple[int, float], ...]


class NotFiniteError(TrainingError):
    """The loss or its gradient became NaN or infinite; what was saved before is sound."""


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Attributes:
        curve: loss of each step; ``held_out`` of the held-out examples, at step 0 before anything was learnt.
        kept: loss of the held-out examples with what was saved.
        divergence: of the rows that were to be retained and were held out, from the base, with what was saved; None
            where nothing was to be retained. ``divergences``: by step.
        best: the step whose weights were kept.
        tokens: that were read, those of questions too; ``seconds`` of this process alone.
        stopped: whether it ended early, since the held-out loss no longer fell.
    """

    curve: Curve
    held_out: Curve
    kept: float
    divergence: float | None
    divergences: Curve
    best: int
    steps: int
    tokens: int
    seconds: float
    stopped: bool


def device_of(training: Training) -> tuple[str, bool]:
    """``cuda`` or ``cpu``, and whether the base is in bfloat16.

    Raises:
        TrainingError: bf16 is asked for, and the GPU has none.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    able = not on_gpu or torch.cuda.is_bf16_supported()
    if training.precision == "bf16" and not able:
        raise TrainingError("this GPU does not compute in bf16", hint="--set precision=fp32")
    return ("cuda" if on_gpu else "cpu"), training.precision == "bf16" or (
        training.precision == "auto" and on_gpu and able
    )


def train(
    checkpoint: Path,
    tokenizer: Any,
    rows: Rows,
    training: Training,
    work: Path,
    adapter: Path,
    progress: Callable[[str], None],
    against: Against | None = None,
) -> Trained:
    """Train and save what was best.

    Args:
        work: folder of the checkpoints; a training that was killed goes on from the last whole one in it.
        adapter: folder that peft's two files are written into.
        against: an artifact whose weights the base gets instead of its own.

    Raises:
        NotFiniteError: the loss became NaN or infinite; ``last_good`` finds what was saved before.
        TrainingError: the model has none of the matrices that the options name.
        SourceError: transformers cannot load the checkpoint.
    """
    from transformers import PrinterCallback, set_seed

    set_seed(training.seed)
    watch = Watch(training.patience, progress)
    trainer = _trainer(_model(checkpoint, training, against), tokenizer, rows, training, work, watch)
    trainer.remove_callback(PrinterCallback)
    before = _loss_before(trainer, work)
    resumed = last_good(work)
    if resumed:
        progress(f"going on from step {resumed.name.rpartition('-')[2]}")
    begin = time.monotonic()
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    state = trainer.state
    told = _evaluations(state)
    kept = min(told, key=_judged, default={"eval_loss": before})
    if training.strength < 1:
        _weaken(trainer.model, training.strength)
        kept = trainer.evaluate()
    trainer.model.save_pretrained(adapter)
    return Trained(
        curve=_curve(state.log_history, "loss"),
        held_out=((0, before), *_curve(told, "eval_loss")),
        kept=float(kept["eval_loss"]),
        divergence=kept.get(f"eval_{DIVERGENCE}"),
        divergences=_curve(told, f"eval_{DIVERGENCE}"),
        best=int(state.best_global_step or state.global_step),
        steps=state.global_step,
        tokens=watch.tokens,
        seconds=time.monotonic() - begin,
        stopped=state.global_step < state.max_steps,
    )


def last_good(work: Path) -> Path | None:
    """The last checkpoint that was written whole: its state is written last, and must be JSON."""
    found = []
    for folder in work.glob("checkpoint-*"):
        step = folder.name.rpartition("-")[2]
        if not (step.isdigit() and (folder / STATE).is_file() and (folder / WEIGHTS).is_file()):
            continue
        try:
            json.loads((folder / STATE).read_text(encoding="utf-8"))
        except ValueError:
            # killed while it was written
            continue
        found.append((int(step), folder))
    return max(found)[1] if found else None


class Watch(TrainerCallback):  # type: ignore[misc]
    """Says how training goes, stops it when the held-out loss no longer falls, and when the loss is not a number."""

    def __init__(self, patience: int, progress: Callable[[str], None]) -> None:
        self._patience, self._progress = patience, progress
        self._begin, self._said = time.monotonic(), -EVERY
        self._first: tuple[int, int] | None = None
        self.tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Where the clock starts, behind what an earlier process did."""
        self._begin, self._first = time.monotonic(), None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """After each step, before anything of it is saved."""
        told = logs or {}
        for name in ("loss", DIVERGENCE, "grad_norm", "eval_loss", f"eval_{DIVERGENCE}"):
            if name in told and not math.isfinite(told[name]):
                what = "gradient" if name == "grad_norm" else name.removeprefix("eval_")
                raise NotFiniteError(f"the {what} became {told[name]} at step {state.global_step}")
        if "loss" not in told:
            return
        self.tokens = int(told.get("num_tokens", 0))
        self._first = self._first or (state.global_step, self.tokens)
        now = time.monotonic() - self._begin
        steps, tokens = state.global_step - self._first[0], self.tokens - self._first[1]
        if now - self._said >= EVERY and steps:
            self._said = now
            left = now / (steps + 1) * (state.max_steps - state.global_step)
            apart = f", divergence {told[DIVERGENCE]:.3f}" if DIVERGENCE in told else ""
            self._progress(
                f"step {state.global_step} of {state.max_steps}, epoch {state.epoch:.1f}: loss {told['loss']:.3f}"
                f"{apart}, {tokens / steps * (steps + 1) / now:.0f} tok/s, {duration(left)} left"
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """After each evaluation; the history also holds those of an earlier process."""
        apart = metrics.get(f"eval_{DIVERGENCE}")
        told = "" if apart is None else f", divergence of what is retained {apart:.4f}"
        self._progress(f"held-out loss {metrics['eval_loss']:.4f}{told}")
        losses = [_judged(entry) for entry in _evaluations(state)]
        if losses and len(losses) - 1 - losses.index(min(losses)) >= self._patience:
            self._progress(f"the held-out loss has not fallen for {self._patience} evaluations: training stops")
            control.should_training_stop = True


def _evaluations(state: Any) -> list[dict[str, Any]]:
    return [entry for entry in state.log_history if "eval_loss" in entry and entry["step"]]


def _judged(entry: dict[str, Any]) -> float:
    """What an evaluation is judged by: the loss, and what the divergence counts beside it."""
    return float(entry.get(f"eval_{JUDGED}", entry["eval_loss"]))


def _curve(entries: Iterable[dict[str, Any]], name: str) -> Curve:
    return tuple((entry["step"], entry[name]) for entry in entries if name in entry)


def _weaken(model: Any, strength: float) -> None:
    """B counts ``strength`` times as much: how far the model's answers change falls with the square of it."""
    for name, weights in model.named_parameters():
        if ".lora_B." in name:
            weights.data.mul_(strength)


def _loss_before(trainer: Any, work: Path) -> float:
    """Of the held-out examples before anything is learnt; kept for a process that goes on."""
    kept = work / "before.record.json"
    if not kept.exists():
        found = float(trainer.evaluate()["eval_loss"])
        kept.write_text(json.dumps({"eval_loss": found}), encoding="utf-8")
    return float(json.loads(kept.read_text(encoding="utf-8"))["eval_loss"])


def _model(checkpoint: Path, training: Training, against: Against | None = None) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    in_bf16 = device_of(training)[1]
    try:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=torch.bfloat16 if in_bf16 else torch.float32,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SourceError(f"PyTorch cannot load the checkpoint: {error}", where=str(checkpoint)) from error
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if missing := [name for name in training.targets if name not in present]:
        raise TrainingError(f"the model has no {', '.join(missing)}", hint="--set targets=[…] with those that it has")
    if against:
        against.put_weights(model, checkpoint)
    return model


def _trainer(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    training: Training,
    work: Path,
    watch: Watch,
) -> Any:
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from trl import SFTTrainer

    disable_progress_bars()
    # deprecations among these libraries, which nobody who trains can act upon
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl|torch)\.")
    device, in_bf16 = device_of(training)
    lora = LoraConfig(
        r=training.rank,
        lora_alpha=training.alpha,
        lora_dropout=training.dropout,
        target_modules=list(training.targets),
        task_type="CAUSAL_LM",
    )
    sets = [
        Dataset.from_list([{"input_ids": row.ids, "labels": row.labels} for row in part])
        for part in (rows.learnt, rows.held_out)
    ]
    given = {
        "model": model,
        "args": _arguments(training, work, device, in_bf16, f"eval_{JUDGED}" if rows.retained else "eval_loss"),
        "train_dataset": sets[0],
        "eval_dataset": sets[1],
        "processing_class": tokenizer,
        "peft_config": lora,
        "callbacks": [watch],
    }
    if not rows.retained:
        return SFTTrainer(**given)
    from qwen_onnx.finetune.retain import RetainingTrainer

    return RetainingTrainer(
        **given,
        retained=rows.retained,
        held_out=rows.retained_out,
        weight=training.retain,
        tokens=training.batch * training.window,
    )


def _arguments(training: Training, work: Path, device: str, in_bf16: bool, judged: str) -> Any:
    from trl import SFTConfig

    when = {"strategy": "steps" if training.every else "epoch", "steps": training.every or 1}
    return SFTConfig(
        output_dir=str(work),
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch,
        per_device_eval_batch_size=training.batch,
        gradient_accumulation_steps=training.accumulate,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule if training.schedule != "constant" else "constant_with_warmup",
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        max_length=training.window,
        packing=training.packing,
        gradient_checkpointing=training.gradient_checkpointing,
        bf16=in_bf16,
        use_cpu=device == "cpu",
        eval_strategy=when["strategy"],
        eval_steps=when["steps"],
        save_strategy=when["strategy"],
        save_steps=when["steps"],
        # the best one and the last
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=judged,
        greater_is_better=False,
        logging_steps=1,
        # it would hide a NaN behind the mean of other steps
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device == "cuda",
        seed=training.seed,
        data_seed=training.seed,
    )
