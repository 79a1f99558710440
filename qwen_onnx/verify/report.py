"""The report: a record for machines, a page for people, a table for the terminal."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from qwen_onnx.bounded import read_record
from qwen_onnx.catalog.schema import Limits, Verification
from qwen_onnx.errors import ArtifactError
from qwen_onnx.records import MeasuredVerdict, Verdict
from qwen_onnx.verify import plots
from qwen_onnx.verify.records import CheckResult, Drift, Frozen, Latency, TaskResult, VerifyOptions

if TYPE_CHECKING:
    from jinja2 import Environment
    from rich.console import Console
    from rich.table import Table

PACKAGES = ("onnxruntime", "onnxruntime-genai", "tokenizers", "torch", "transformers", "numpy", "qwen-onnx")
STYLES = {Verdict.PASS: "green", Verdict.FAIL: "bold red", Verdict.INCONCLUSIVE: "yellow"}


class Report(Frozen):
    """Everything that a verification found. ``verdict`` is the worst of the checks'.

    ``claim`` says what that proves at this verification level; ``not_checked`` holds the checks that the level does
    not promise, with the reason.
    """

    verdict: MeasuredVerdict
    verification: Verification
    claim: str
    checks: tuple[CheckResult, ...]
    not_checked: dict[str, str] = Field(default_factory=dict)
    drift: Drift | None = None
    latency: Latency | None = None
    tasks: tuple[TaskResult, ...] = ()
    limits: Limits
    options: VerifyOptions
    environment: dict[str, str | float] = Field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True only for PASS: what could not be decided has not passed."""
        return self.verdict is Verdict.PASS

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write ``report.json`` and ``report.html`` into ``folder`` and return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        record, page = folder / "report.json", folder / "report.html"
        record.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        page.write_text(self.html(), encoding="utf-8")
        return record, page

    def json_line(self) -> str:
        """One line of JSON: the verdict, what did not pass, and the main figures."""
        line: dict[str, object] = {
            "verdict": self.verdict,
            "claim": self.claim,
            "not_passed": [item.name for item in self.checks if item.verdict is not Verdict.PASS],
        }
        if self.drift:
            names = ("kld_mean", "kld_p99", "top1", "ppl_ratio")
            line |= {name: getattr(self.drift, name).value for name in names}
            line["depth"] = self.options.depth
            line["domains"] = {domain.name: domain.kld_mean.value for domain in self.drift.domains}
        if self.latency:
            line["decode_speedup"] = self.latency.decode_speedup.value
            line["prefill_speedup"] = self.latency.prefill_speedup.value
            line["decode_tok_s"] = self.latency.artifact.decode_tok_s.median
        if self.tasks:
            line["recovery"] = {task.name: task.recovery.value if task.recovery else None for task in self.tasks}
        return json.dumps(line)

    def html(self) -> str:
        """The page: one file, no script, nothing loaded from elsewhere."""
        page = _templates().get_template("report.html.j2")
        return page.render(
            report=self, plots=plots, compared=compared, task_cells=task_cells, columns=TASK_COLUMNS, **self._charts()
        )

    def svgs(self) -> dict[str, str]:
        """The page's plots as files of their own, by name; those that something was measured for."""
        module: Any = _templates().get_template("plots.svg.j2").make_module({"plots": plots})
        charts, style = self._charts(), module.style()
        drawn = {
            "drift.svg": charts["kld"] and module.kld_plot(charts["kld"], style),
            "drift-by-text.svg": charts["bars"] and module.domain_plot(charts["bars"], style),
            "speed.svg": charts["pairs"] and module.paired_plot(charts["pairs"], style),
        }
        return {name: f"{svg}\n" for name, svg in drawn.items() if svg}

    def _charts(self) -> dict[str, plots.Chart | plots.Bars | None]:
        drift, limits = self.drift, self.limits
        return {
            "kld": plots.kld_chart(drift, limits.kld_mean, limits.kld_p99) if drift else None,
            "bars": plots.domain_bars(drift, limits.domain_factor * limits.kld_mean) if drift else None,
            "pairs": plots.paired_chart(self.latency) if self.latency else None,
        }


def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("qwen_onnx", "verify"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["number"] = shown
    return environment


def load_report(folder: Path) -> Report:
    """The report inside an artifact; ArtifactError when it is missing or damaged."""
    hint = f"qwen-onnx verify {folder}"
    return read_record(folder / "report.json", Report, most_bytes=16 << 20, error=ArtifactError, hint=hint)


def shown(value: float | str) -> str:
    """A figure for people; text stays as it is."""
    return value if isinstance(value, str) else plots.number(value)


def environment() -> dict[str, str | float]:
    """Machine and package versions, which every figure depends on."""
    found: dict[str, str | float] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count() or 0,
    }
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def compared(item: CheckResult) -> list[tuple[str, str, str]]:
    """(name, measured, limit) of a check: first what is limited, then what else was measured, without the bounds."""
    plain = [name for name in item.measured if not name.endswith(("_lower", "_upper"))]
    ordered = sorted(plain, key=lambda name: name not in item.limit)
    return [(name, _with_bounds(item, name), shown(item.limit[name]) if name in item.limit else "") for name in ordered]


def _with_bounds(item: CheckResult, name: str) -> str:
    text = shown(item.measured[name])
    if f"{name}_lower" not in item.measured:
        return text
    return f"{text} [{shown(item.measured[f'{name}_lower'])}, {shown(item.measured[f'{name}_upper'])}]"


def task_cells(task: TaskResult) -> tuple[str, ...]:
    """Of a table for people: accuracies and flips of one benchmark."""
    kept = task.recovery
    recovery = f"{kept.value:.3f} [{kept.lower:.3f}, {kept.upper:.3f}]" if kept else "PyTorch answers too few rightly"
    accuracies = (f"{100 * task.artifact:.1f} %", f"{100 * task.baseline:.1f} %")
    return (
        task.name,
        task.metric,
        str(task.items),
        *accuracies,
        recovery,
        f"-{task.lost} +{task.won}",
        f"{task.p:.3g}",
    )


TASK_COLUMNS = ("task", "metric", "items", "artifact", "PyTorch", "recovery [bounds]", "flips", "McNemar p")


def _tasks_table(report: Report) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="tasks: what the artifact keeps of PyTorch's accuracy")
    for column in ("verdict", *TASK_COLUMNS):
        table.add_column(escape(column))
    for task in report.tasks:
        table.add_row(f"[{STYLES[task.verdict]}]{task.verdict}[/]", *map(escape, task_cells(task)))
    return table


def check_table(checks: Sequence[CheckResult], verdict: Verdict, claim: str) -> Table:
    """The checks for people."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"verification: {verdict}\n{escape(claim)}", title_style=STYLES[verdict])
    for column in ("check", "verdict", "measured [bounds]", "limit", "seconds"):
        table.add_column(column, justify="right" if column in ("limit", "seconds") else "left")
    for item in checks:
        head = [item.name, f"[{STYLES[item.verdict]}]{item.verdict}[/]"]
        rows = [(f"{name} {value}", limit) for name, value, limit in compared(item)]
        rows += [(item.detail, "")] if item.detail else []
        for index, (measured, limit) in enumerate(rows):
            first = index == 0
            table.add_row(
                *(head if first else ("", "")), escape(measured), limit, f"{item.seconds:.1f}" if first else ""
            )
        table.add_section()
    return table


def print_report(report: Report, console: Console) -> None:
    """A table for people, then one line of JSON for programs."""
    from rich.markup import escape

    table = check_table(report.checks, report.verdict, report.claim)
    for name, reason in report.not_checked.items():
        table.add_row(name, "–", escape(reason))
    console.print(table)
    if report.tasks:
        console.print(_tasks_table(report))
    console.print(report.json_line(), markup=False, highlight=False, soft_wrap=True)
