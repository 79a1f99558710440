"""Which grid each matrix gets: the least damage within so many bytes, or the fewest bytes within so much damage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Choice:
    """One way to store a matrix: its size in ``bytes``, the KLD that it costs, and its place among the others."""

    bytes: int
    damage: float
    option: str


@dataclass(frozen=True)
class Allocation:
    """The option of each matrix, with the sums of ``bytes`` and ``damage``."""

    options: dict[str, str]
    bytes: int
    damage: float


class Unreachable(ValueError):
    """``least``: bytes or damage that the best allocation has."""

    def __init__(self, least: float) -> None:
        super().__init__(f"{least} at least")
        self.least = least


def allocate(
    choices: Mapping[str, list[Choice]], *, most_bytes: int | None = None, most_damage: float | None = None
) -> Allocation:
    """Steps along each matrix's convex hull of size and damage, the one that gains most per byte first.

    Args:
        choices: by matrix, or by what shares one grid.
        most_bytes, most_damage: one of them; the other is made as small as it can be.

    Raises:
        Unreachable: no choice keeps to the bound.
    """
    hulls = {name: _hull(options) for name, options in choices.items()}
    place = dict.fromkeys(hulls, 0)
    total, harm = sum(hull[0].bytes for hull in hulls.values()), sum(hull[0].damage for hull in hulls.values())
    if most_bytes is not None and total > most_bytes:
        raise Unreachable(total)
    steps = [
        ((before.damage - after.damage) / (after.bytes - before.bytes), name, number)
        for name, hull in hulls.items()
        for number, (before, after) in enumerate(pairwise(hull), 1)
    ]
    # gains fall along a hull, so that no step comes before the one that it stands on
    for _, name, number in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        if most_damage is not None and harm <= most_damage:
            break
        before, after = hulls[name][place[name]], hulls[name][number]
        fits = most_bytes is None or total + after.bytes - before.bytes <= most_bytes
        if number == place[name] + 1 and fits:
            place[name], total, harm = number, total + after.bytes - before.bytes, harm + after.damage - before.damage
    if most_damage is not None and harm > most_damage:
        raise Unreachable(harm)
    chosen = {name: hulls[name][place[name]] for name in hulls}
    return Allocation({name: choice.option for name, choice in chosen.items()}, total, harm)


def _hull(options: list[Choice]) -> list[Choice]:
    """The options that some price per byte makes the best, by rising size."""
    hull: list[Choice] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.damage)):
        if hull and option.damage >= hull[-1].damage:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _gain(before: Choice, after: Choice) -> float:
    return (before.damage - after.damage) / (after.bytes - before.bytes)
