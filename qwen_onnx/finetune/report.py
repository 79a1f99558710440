"""The report of a training: a record for machines, a page with the loss for people, a table for the terminal."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from qwen_onnx.finetune.estimate import duration
from qwen_onnx.records import Record, Verdict
from qwen_onnx.sources.adapter import AdapterManifest
from qwen_onnx.verify import plots
from qwen_onnx.verify.report import environment, shown

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = ("peft", "trl", "accelerate", "datasets", "torch", "transformers", "tokenizers", "safetensors", "qwen-onnx")
PAGE, RECORD = "report.html", "report.json"
Curve = tuple[tuple[int, float], ...]


class TrainingReport(Record):
    """What a training came to; ``manifest`` is the adapter's, before its files were listed.

    Attributes:
        curve: loss by step; ``held_out`` by step of evaluation, 0 before anything was learnt.
        divergences: of retained rows that were held out, by step of evaluation; empty where nothing was retained.
        best: step whose weights were kept; ``notes``, what else there is to tell.
    """

    manifest: AdapterManifest
    device: str
    curve: Curve
    held_out: Curve
    divergences: Curve = ()
    best: int = Field(ge=0)
    notes: tuple[str, ...] = ()
    environment: dict[str, str | float] = Field(default_factory=dict)

    @property
    def claim(self) -> str:
        """What the verdict says, and no more."""
        made = self.manifest
        fell = "fell" if made.verdict is Verdict.PASS else "did not fall"
        figures = f"from {made.loss_before:.4g} to {made.loss_after:.4g}"
        rounded = f", with the weights of {made.against.artifact}" if made.against else ""
        held = f"{made.data.held_out} held-out example{'s' if made.data.held_out > 1 else ''}"
        kept = made.retained
        apart = f"; what was to be retained diverges by {kept.divergence:.3g} nats per token" if kept else ""
        return f"the loss of {held} {fell}: {figures} nats per answer token{rounded}{apart}"

    @property
    def effort(self) -> str:
        """Steps, tokens and time of the process that ended it."""
        made = self.manifest
        return f"{made.steps:,} steps, {made.tokens:,} tokens, {duration(made.seconds)}"

    def save(self, folder: Path) -> None:
        """Write both files into ``folder``."""
        (folder / RECORD).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (folder / PAGE).write_text(self.html(), encoding="utf-8")

    def html(self) -> str:
        """The page: one file, no script, nothing loaded from elsewhere."""
        from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

        loaders = [PackageLoader("qwen_onnx", room) for room in ("finetune", "verify")]
        templates = Environment(
            loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        templates.filters["number"] = shown
        learnt, held = plots.curves([self.curve, self.held_out])
        page = templates.get_template("training.html.j2")
        return page.render(report=self, made=self.manifest, plots=plots, learnt=learnt, held=held)

    def json_line(self, folder: Path) -> str:
        """One line of JSON: the verdict and the main figures."""
        made = self.manifest
        told = {
            "verdict": made.verdict,
            "claim": self.claim,
            "adapter": str(folder),
            "loss_before": made.loss_before,
            "loss_after": made.loss_after,
            "divergence": made.retained.divergence if made.retained else None,
            "best_step": self.best,
            "steps": made.steps,
            "tokens": made.tokens,
            "seconds": round(made.seconds, 1),
        }
        return json.dumps(told)

    def print(self, folder: Path, console: Console) -> None:
        """A table for people."""
        from rich.table import Table

        made = self.manifest
        style = "green" if made.verdict is Verdict.PASS else "bold red"
        table = Table(title=f"training: {made.verdict}\n{self.claim}", title_style=style)
        table.add_column("what")
        table.add_column("measured", justify="right")
        kept = made.retained
        for name, value in (
            ("examples learnt from", f"{made.data.examples - made.data.held_out:,}"),
            ("held-out loss before", shown(made.loss_before)),
            ("held-out loss after", shown(made.loss_after)),
            *((("divergence of retained rows", shown(kept.divergence)),) if kept else ()),
            ("kept step, of", f"{self.best:,}, {made.steps:,}"),
            ("tokens", f"{made.tokens:,}"),
            ("time", duration(made.seconds)),
            ("tokens per second", f"{made.tokens / max(made.seconds, 1e-9):.0f}"),
        ):
            table.add_row(name, value)
        for note in self.notes:
            table.add_row("note", note)
        console.print(table)
        console.print(f"report: {folder / PAGE}", soft_wrap=True, markup=False)


def versions() -> dict[str, str]:
    """Of the packages that an adapter depends on."""
    return {name: metadata.version(name) for name in PACKAGES}


def machine() -> dict[str, str | float]:
    """Machine and packages, which time and the last digits depend on."""
    return environment() | versions()
