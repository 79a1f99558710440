"""Geometry of the report's plots in SVG units; the template draws, this module only places."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from pydantic import Field

from qwen_onnx.verify.records import Drift, Frozen, Latency

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 16, 44
BAR_ROW, BAR_LEFT = 34, 120


class Tick(Frozen):
    """A grid line at ``at`` with its label."""

    at: float
    label: str


class Chart(Frozen):
    """A line or scatter plot. ``points`` are (x, y); ``marks`` are vertical lines."""

    points: tuple[tuple[float, float], ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Tick, ...] = ()
    path: str = ""


class Bar(Frozen):
    """One horizontal bar with the whisker of its bounds."""

    name: str
    y: float
    end: float
    lower: float
    upper: float
    label: str
    over: bool


class Bars(Frozen):
    """Bars from the top down; ``limit`` is a vertical line."""

    bars: tuple[Bar, ...]
    limit: Tick | None = None
    height: float = Field(gt=0)


def number(value: float) -> str:
    """Three significant digits without an exponent for everyday sizes."""
    return f"{value:.3g}" if abs(value) < 1e3 else f"{value:,.0f}"


def _x(share: float) -> float:
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 2)


def _y(share: float) -> float:
    return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 2)


def steps(top: float, count: int = 4) -> list[float]:
    """Round values from 0 to at least ``top``."""
    if not (math.isfinite(top) and top > 0):
        return [0.0, 1.0]
    raw = top / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    return [index * step for index in range(math.ceil(top / step) + 1)]


def kld_chart(drift: Drift, mean_limit: float, p99_limit: float) -> Chart:
    """Share of positions at or below each KLD, the KLD on a logarithmic axis."""
    low, high = -5.0, max(1.0, math.ceil(math.log10(max(drift.quantiles[-1][1], p99_limit))))

    def place(kld: float) -> float:
        return _x((min(max(math.log10(max(kld, 1e-12)), low), high) - low) / (high - low))

    points = tuple((place(kld), _y(share)) for share, kld in drift.quantiles)
    decades = range(int(low), int(high) + 1)
    return Chart(
        points=points,
        path=_path(points),
        x_ticks=tuple(Tick(at=place(10.0**power), label=number(10.0**power)) for power in decades),
        y_ticks=tuple(Tick(at=_y(share / 4), label=f"{share * 25} %") for share in range(5)),
        marks=(
            Tick(at=place(mean_limit), label="limit of the mean"),
            Tick(at=place(p99_limit), label="limit of p99"),
        ),
    )


def domain_bars(drift: Drift, limit: float) -> Bars:
    """Mean KLD of each domain with its bounds, and the limit of the worst domain."""
    top = max([limit, *(domain.kld_mean.upper for domain in drift.domains)]) * 1.15

    def place(value: float) -> float:
        return round(BAR_LEFT + value / top * (WIDTH - BAR_LEFT - 70), 2)

    bars = tuple(
        Bar(
            name=domain.name,
            y=28 + index * BAR_ROW,
            end=place(domain.kld_mean.value),
            lower=place(domain.kld_mean.lower),
            upper=place(domain.kld_mean.upper),
            label=number(domain.kld_mean.value),
            over=domain.kld_mean.upper > limit,
        )
        for index, domain in enumerate(drift.domains)
    )
    return Bars(bars=bars, limit=Tick(at=place(limit), label=f"limit {number(limit)}"), height=40 + len(bars) * BAR_ROW)


def paired_chart(latency: Latency) -> Chart:
    """Each pair of neighbouring measurements: PyTorch across, the artifact upwards, and the line of equal speed."""
    pairs = latency.pairs
    x_steps = steps(max(baseline for _, baseline in pairs))
    y_steps = steps(max(speed for pair in pairs for speed in pair))
    x_top, y_top = x_steps[-1], y_steps[-1]
    equal = min(x_top, y_top)
    return Chart(
        points=tuple((_x(baseline / x_top), _y(ours / y_top)) for ours, baseline in pairs),
        path=f"M{_x(0)} {_y(0)} L{_x(equal / x_top)} {_y(equal / y_top)}",
        x_ticks=_ticks(x_steps, x_top, _x),
        y_ticks=_ticks(y_steps, y_top, _y),
    )


def curves(lines: Sequence[Sequence[tuple[float, float]]]) -> tuple[Chart, ...]:
    """Lines of (x, y), none of them negative, over common axes that begin at 0; every chart has the ticks of all."""
    x_steps, y_steps = (steps(max((point[axis] for line in lines for point in line), default=0.0)) for axis in (0, 1))
    x_top, y_top = x_steps[-1], y_steps[-1]
    placed = [tuple((_x(x / x_top), _y(y / y_top)) for x, y in line) for line in lines]
    ticks = {"x_ticks": _ticks(x_steps, x_top, _x), "y_ticks": _ticks(y_steps, y_top, _y)}
    return tuple(Chart(points=line, path=_path(line), **ticks) for line in placed)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{x} {y}" for x, y in points) if points else ""


def _ticks(values: Sequence[float], top: float, place: Callable[[float], float]) -> tuple[Tick, ...]:
    return tuple(Tick(at=place(value / top), label=number(value)) for value in values)
