"""Figures with their spread, as a table for people and one line of JSON, and bounds on them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from qwen_onnx.errors import ConfigError

RESAMPLES, SEED = 10_000, 20
BOUND = re.compile(r"(?P<name>[^<>=]+)(?P<sign><=|>=)(?P<value>-?\d+(\.\d+)?)")


@dataclass(frozen=True)
class Figure:
    """A median over rounds, its extremes, and the bootstrap's 2.5 % and 97.5 % quantiles of that median."""

    median: float
    least: float
    most: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure | None:
        """From one value a round; None when no round gave one. NaN is no value."""
        finite = np.asarray([value for value in values if math.isfinite(value)])
        if not len(finite):
            return None
        draws = np.random.default_rng(SEED).choice(finite, (RESAMPLES, len(finite)))
        low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
        extremes = float(finite.min()), float(finite.max())
        return cls(float(np.median(finite)), *extremes, float(low), float(high), len(finite))


Figures = Mapping[str, Figure | None]


def show(figures: Figures, title: str, console: Console) -> None:
    """The table; a figure that could not be measured says so."""
    table = Table(title=title)
    table.add_column("figure", no_wrap=True)
    for name in ("median", "min–max", "95 % interval", "n"):
        table.add_column(name, justify="right")
    for name, figure in figures.items():
        if figure is None:
            table.add_row(name, "not measured", "", "", "0")
            continue
        spread, interval = f"{figure.least:.2f}–{figure.most:.2f}", f"{figure.low:.2f}–{figure.high:.2f}"
        table.add_row(name, f"{figure.median:.2f}", spread, interval, str(figure.count))
    console.print(table)


def as_json(head: Mapping[str, Any], figures: Figures) -> str:
    """One line: ``head`` and, under ``figures``, what was measured; null is what was not."""
    told = {name: figure and asdict(figure) for name, figure in figures.items()}
    return json.dumps({**head, "figures": told}, ensure_ascii=False)


@dataclass(frozen=True)
class Bound:
    """``NAME>=VALUE`` or ``NAME<=VALUE``, on a median."""

    name: str
    sign: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Bound:
        """ConfigError when ``text`` is no bound."""
        found = BOUND.fullmatch(text.replace(" ", ""))
        if not found:
            raise ConfigError([f"--gate: {text!r} is not NAME>=VALUE or NAME<=VALUE"])
        return cls(found["name"], found["sign"], float(found["value"]))

    def broken(self, figures: Figures) -> str | None:
        """What is wrong, if anything; a figure that was not measured keeps no bound. ConfigError: unknown name."""
        if self.name not in figures:
            raise ConfigError([f"--gate: no figure {self.name!r}; there are {', '.join(figures)}"])
        figure = figures[self.name]
        if figure is None:
            return f"{self.name} was not measured, asked for is {self.sign} {self.value:g}"
        kept = figure.median >= self.value if self.sign == ">=" else figure.median <= self.value
        return None if kept else f"{self.name} is {figure.median:g}, asked for is {self.sign} {self.value:g}"


def conclude(told: Mapping[str, Any], title: str, bounds: Sequence[Bound]) -> int:
    """The table, every broken bound, and last the line of JSON; returns the exit code, 1 when a bound is broken.

    Args:
        told: ``head``, where and how it was measured, and ``figures``.

    Raises:
        ConfigError: a bound is on a figure that there is not.
    """
    show(told["figures"], title, Console())
    broken = [fault for bound in bounds if (fault := bound.broken(told["figures"]))]
    for fault in broken:
        Console(stderr=True).print(f"gate: {fault}", markup=False)
    print(as_json(told["head"], told["figures"]))
    return 1 if broken else 0
