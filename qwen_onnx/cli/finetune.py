"""``qwen-onnx finetune``: a file of examples becomes an adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from qwen_onnx.cli.options import AsJson, Model, RecipeOption, SourceOption, artifact_at, cache_here, wanted
from qwen_onnx.errors import TrainingError

if TYPE_CHECKING:
    from qwen_onnx.finetune.estimate import Cost

out = Console()
# of ``catalog.training.Training``, which loads what the help of other verbs does not need: a test compares
KEYS = (
    "rank, alpha, dropout, targets, strength, retain, learning_rate, schedule, warmup, weight_decay, max_grad_norm, "
    "epochs, window, batch, accumulate, packing, longer, held_out, patience, every, precision, gradient_checkpointing, "
    "seed"
)


def finetune(
    model: Model,
    data: Annotated[Path, typer.Option(help='JSONL of {"messages": …} or {"instruction": …, "output": …}')],
    output: Annotated[Path | None, typer.Option(help="folder of the adapter; default adapters/MODEL/FILE")] = None,
    training: Annotated[Path | None, typer.Option(help="YAML of options; default pipelines/finetune/lora.yaml")] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help=f"one option, e.g. epochs=3; repeatable; keys: {KEYS}"),
    ] = None,
    source: SourceOption = None,
    against: Annotated[
        Path | None,
        typer.Option(
            parser=artifact_at,
            metavar="ARTIFACT",
            help="train on the rounded weights of this artifact, in whose slots the adapter is served",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything and say time and memory, but train nothing")
    ] = False,
    wait: bool = typer.Option(True, help="wait while another process trains the same adapter"),
    recipe: RecipeOption = None,
    as_json: AsJson = False,
) -> None:
    """Train a LoRA adapter for MODEL on examples. Exits non-zero unless the held-out loss fell."""
    from qwen_onnx.catalog.load import find_root, work_root
    from qwen_onnx.catalog.training import load_training
    from qwen_onnx.finetune.job import FinetuneJob, prepare
    from qwen_onnx.finetune.job import finetune as run
    from qwen_onnx.processes.progress import progress
    from qwen_onnx.records import Verdict
    from qwen_onnx.sources.adapter import adapter_name

    options = load_training(find_root(), training, change or ())
    asked = wanted(model, "cpu", source=source, recipes=recipe)
    place = output or work_root() / "adapters" / asked.plan.model / data.stem
    name = adapter_name(place.resolve().name)
    rounded = against.resolve() if against else None
    job = FinetuneJob(asked.plan, options, data, place.resolve(), name, cache_here(), asked.source, rounded, wait)
    ready = prepare(job)
    if as_json:
        for note in ready.notes:
            progress(note)
    else:
        _print_cost(ready.cost, ready.notes)
    if dry_run:
        print(ready.cost.line())
        return
    report, folder = run(job, ready)
    shown = Path(os.path.relpath(folder)) if folder.is_relative_to(Path.cwd()) else folder
    if not as_json:
        report.print(shown, out)
    print(report.json_line(shown))
    if report.manifest.verdict is not Verdict.PASS:
        raise TrainingError(
            report.claim, where=str(shown), hint="more epochs, or another rate: --set epochs=… --set learning_rate=…"
        )


def _print_cost(cost: Cost, notes: list[str]) -> None:
    from rich.table import Table

    from qwen_onnx.finetune.estimate import duration

    table = Table("training", "about", title=f"{cost.examples:,} examples to learn from, {cost.held_out:,} held out")
    table.add_row("time", duration(cost.seconds))
    table.add_row(f"memory ({cost.device})", f"{cost.memory / 1e9:.1f} GB")
    table.add_row("steps", f"{cost.steps:,}")
    table.add_row("tokens of an epoch", f"{cost.tokens:,}")
    table.add_row("of answers", f"{cost.answers:,}")
    if cost.retained:
        table.add_row("of retained rows, beside", f"{cost.retained:,}")
    table.add_row("trained numbers", f"{cost.trained:,}")
    for note in notes:
        table.add_row("note", note)
    out.print(table)
