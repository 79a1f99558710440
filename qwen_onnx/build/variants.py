"""Build every variant of a target's quantisation and measure them all: the figures that the default is chosen by."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_onnx.build.optimize import build_model
from qwen_onnx.build.toolchain import Toolchain
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.catalog.schema import Verification
from qwen_onnx.files import folder_bytes
from qwen_onnx.sources.fetch import Checkpoint

if TYPE_CHECKING:
    from rich.console import Console

    from qwen_onnx.verify import Report


def measure(plan: Plan, checkpoint: Checkpoint, scratch: Path, *, speed: bool) -> dict[str, Any]:
    """Build one variant below ``scratch``, measure it and remove it.

    Returns:
        ``bytes``, ``kld_mean``, ``kld_p99``, ``top1``, ``ppl_ratio``, the verdict of ``drift`` and, with ``speed``,
        ``decode_tok_s``, ``decode_speedup`` and ``prefill_speedup``.
    """
    from qwen_onnx.verify.records import VerifyOptions

    with tempfile.TemporaryDirectory(dir=scratch, prefix=".compare-") as folder:
        staging = Path(folder)
        tools = Toolchain.of(plan, scratch)
        artifact, _ = build_model(tools, checkpoint, staging, staging / "build.log")
        timed = speed and plan.verification is Verification.RUN
        checks = ("drift", "latency") if timed else ("drift",)
        report = tools.verify(artifact, checkpoint.path, None, VerifyOptions(checks=checks))
        size = folder_bytes(artifact)
    return {"bytes": size, **_figures(report)}


def _figures(report: Report) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "drift": next(item.verdict for item in report.checks if item.name == "drift"),
        **dict.fromkeys(("kld_mean", "kld_p99", "top1", "ppl_ratio")),
    }
    if report.drift:
        figures |= {name: getattr(report.drift, name).value for name in ("kld_mean", "kld_p99", "top1", "ppl_ratio")}
    if report.latency:
        figures["decode_tok_s"] = report.latency.artifact.decode_tok_s.median
        figures["decode_speedup"] = report.latency.decode_speedup.value
        figures["prefill_speedup"] = report.latency.prefill_speedup.value
    return figures


def print_comparison(rows: dict[str, dict[str, Any]], console: Console) -> None:
    """A table for people, then one line of JSON."""
    from rich.table import Table

    table = Table("variant", *(name for name, _, _ in COLUMNS))
    for name, row in rows.items():
        shown = (form(row[key]) if row.get(key) is not None else "–" for _, key, form in COLUMNS)
        table.add_row(name, *shown)
    console.print(table)
    console.print(json.dumps(rows), markup=False, highlight=False, soft_wrap=True)


COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("size", "bytes", lambda value: f"{value / 1e6:.1f} MB"),
    ("KLD", "kld_mean", lambda value: f"{value:.3f}"),
    ("p99", "kld_p99", lambda value: f"{value:.2f}"),
    ("top-1", "top1", lambda value: f"{value:.1%}"),
    ("perplexity", "ppl_ratio", lambda value: f"× {value:.2f}"),
    ("drift", "drift", str),
    ("decode", "decode_tok_s", lambda value: f"{value:.0f} tok/s"),
    ("decode vs PyTorch", "decode_speedup", lambda value: f"× {value:.2f}"),
    ("prefill vs PyTorch", "prefill_speedup", lambda value: f"× {value:.2f}"),
)
