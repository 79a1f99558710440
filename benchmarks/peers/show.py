"""What was measured, as a record, as tables for people, and as plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.figures import Figure
from benchmarks.peers.measure import CONTROL, Condition, Measured, Speeds
from benchmarks.peers.models import OURS, Model
from qwen_onnx.verify import plots
from qwen_onnx.verify.statistics import median_ratio

KINDS = ("prefill", "decode")
Records = dict[str, dict[str, Any]]


def records(models: Sequence[Model], found: Mapping[str, Measured], conditions: Sequence[Condition]) -> Records:
    """By name of the model.

    Returns:
        ``bytes`` of graph and weights; ``load_s``, the median of all processes; ``peak_rss`` in bytes by depth of the
        prompt; ``drift`` or None: ``kld_mean``, ``kld_p99``, ``top1``, ``ppl_ratio``, each with its bounds; ``speed``
        by condition: ``prefill`` and ``decode`` in tokens per second, and ``prefill_of_ours``, ``decode_of_ours``.
    """
    sizes = {model.name: model.bytes for model in models}
    return {
        name: {
            "bytes": sizes.get(name, sizes[OURS]),
            "load_s": round(median(each.load_s), 3),
            "peak_rss": each.peak_rss,
            "drift": _drift(each),
            "speed": {
                condition.name: _speed(each.speeds[condition.name], found[OURS].speeds[condition.name])
                for condition in conditions
                if each.speeds[condition.name]
            },
        }
        for name, each in found.items()
        if each.load_s
    }


def _drift(measured: Measured) -> dict[str, dict[str, float]] | None:
    if measured.drift is None:
        return None
    return {name: getattr(measured.drift, name).model_dump() for name in ("kld_mean", "kld_p99", "top1", "ppl_ratio")}


def _speed(theirs: Sequence[Speeds], ours: Sequence[Speeds]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for kind in KINDS:
        pairs = [(getattr(a, kind), getattr(b, kind)) for a, b in zip(theirs, ours, strict=True)]
        whole = [pair for pair in pairs if all(map(math.isfinite, pair))]
        figure = Figure.of([mine for mine, _ in pairs])
        told[kind] = figure and asdict(figure)
        told[f"{kind}_of_ours"] = (
            median_ratio([a for a, _ in whole], [b for _, b in whole], seed=0).model_dump() if whole else None
        )
    return told


def show(told: Records, conditions: Sequence[Condition], console: Console) -> None:
    """The tables: what each model is, then how fast."""
    table = Table("", "MB", "mean KLD", "p99", "top-1", "perplexity", "load", "peak memory", title="Size and drift")
    for name, record in told.items():
        if name != CONTROL:
            memory = max(record["peak_rss"].values(), default=None)
            cells = _drift_cells(record["drift"])
            shown = "–" if memory is None else f"{memory / 1e6:.0f} MB"
            table.add_row(name, f"{record['bytes'] / 1e6:.1f}", *cells, f"{record['load_s']:.2f} s", shown)
    console.print(table)
    speeds = [condition for condition in conditions if condition.name in told[OURS]["speed"]]
    if not speeds:
        return
    table = Table("", *told, title="Tokens per second: median, extremes; × of ours with 95 % bounds")
    for condition in speeds:
        for kind in KINDS if condition.streams == 1 else ("decode",):
            many = f", {condition.streams} streams" if condition.streams > 1 else ""
            cells = [_speed_cell(record["speed"].get(condition.name), kind, name) for name, record in told.items()]
            table.add_row(f"{kind}, {condition.depth} tokens{many}", *cells)
    console.print(table)


def _drift_cells(drift: dict[str, dict[str, float]] | None) -> list[str]:
    if drift is None:
        return ["–"] * 4
    mean, top = drift["kld_mean"], drift["top1"]
    return [
        f"{mean['value']:.4f} [{mean['lower']:.4f}, {mean['upper']:.4f}]",
        f"{drift['kld_p99']['value']:.3f}",
        f"{top['value']:.1%} [{top['lower']:.1%}, {top['upper']:.1%}]",
        f"× {drift['ppl_ratio']['value']:.3f}",
    ]


def _speed_cell(speed: dict[str, Any] | None, kind: str, name: str) -> str:
    figure, ratio = (speed[kind], speed[f"{kind}_of_ours"]) if speed else (None, None)
    if figure is None:
        return "–"
    text = f"{figure['median']:.0f} ({figure['least']:.0f}–{figure['most']:.0f})"
    if name == OURS or ratio is None:
        return text
    return f"{text}\n× {ratio['value']:.2f} [{ratio['lower']:.2f}, {ratio['upper']:.2f}]"


def svgs(told: Records, condition: str) -> dict[str, str]:
    """Plots by file name: drift against size, and against the decode speed under ``condition``; those with points."""
    drifts = {name: record["drift"]["kld_mean"]["value"] for name, record in told.items() if record["drift"]}
    sizes = {name: told[name]["bytes"] / 1e6 for name in drifts}
    found = {name: told[name]["speed"].get(condition, {}).get("decode") for name in drifts}
    speeds = {name: figure["median"] for name, figure in found.items() if figure}
    drawn = {
        "kld-size.svg": (sizes, "graph and weights, MB"),
        "kld-speed.svg": (speeds, "decoded tokens per second"),
    }
    return {file: _svg(across, drifts, title) for file, (across, title) in drawn.items() if across}


def _svg(across: Mapping[str, float], up: Mapping[str, float], title: str) -> str:
    from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined

    loader = ChoiceLoader([FileSystemLoader(__file__.rpartition("/")[0]), PackageLoader("qwen_onnx", "verify")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    charts = plots.curves([[(across[name], up[name])] for name in across])
    points = [(name, *chart.points[0]) for name, chart in zip(across, charts, strict=True)]
    page = environment.get_template("points.svg.j2")
    return page.render(plots=plots, chart=charts[0], points=points, title=title) + "\n"
