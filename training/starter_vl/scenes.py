"""What a synthetic picture shows, and the picture itself: shapes on a grid of three by three, or a digit.

A scene is a value made of a seed; ``draw`` renders it at any size, so that the same scene has many pictures.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (214, 32, 36),
    "green": (34, 150, 52),
    "blue": (34, 70, 208),
    "yellow": (246, 214, 20),
    "orange": (246, 134, 16),
    "purple": (136, 40, 162),
    "black": (18, 18, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
COUNTS = ("one", "two", "three", "four", "five", "six")
DIGITS = "0123456789"
GRID = 3
# drawn larger and reduced: smooth edges
SMOOTH = 2
SIDES = (72, 512)


@dataclass(frozen=True)
class Thing:
    """A shape in a cell of the grid; ``x``, ``y`` and ``radius`` are shares of the picture's side."""

    colour: str
    shape: str
    place: int
    x: float
    y: float
    radius: float
    turn: float


@dataclass(frozen=True)
class Scene:
    """Shapes, or a digit in a colour; ``noise`` is the seed of what matters to no question: ground, shades, font."""

    things: tuple[Thing, ...]
    digit: str
    colour: str
    noise: int


def scene(seed: int, digits: float = 0.25, alone: float = 0.25) -> Scene:
    """The scene of a seed: a digit in a share ``digits``, one shape alone in a share ``alone`` of the others."""
    chance = random.Random(seed)
    if chance.random() < digits:
        return Scene((), chance.choice(DIGITS), chance.choice(list(COLOURS)), chance.getrandbits(32))
    count = 1 if chance.random() < alone else chance.choice((2, 2, 3, 3, 4, 5, 6))
    places = chance.sample(range(GRID**2), count)
    return Scene(tuple(_thing(chance, place, count) for place in sorted(places)), "", "", chance.getrandbits(32))


def _thing(chance: random.Random, place: int, count: int) -> Thing:
    cell = 1 / GRID
    # alone it may be larger than a cell; among others it keeps to its own
    radius = cell * (chance.uniform(0.27, 0.46) if count > 1 else chance.uniform(0.3, 0.75))
    play = cell * 0.5 - radius if count > 1 else cell * 0.33
    play = max(0.0, play)
    row, column = divmod(place, GRID)
    centre = [(column + 0.5) * cell, (row + 0.5) * cell]
    x, y = (min(max(at + chance.uniform(-play, play), radius + 0.005), 0.995 - radius) for at in centre)
    # what was pushed inwards from the edge must stay in its cell
    x, y = (min(max(at, middle - cell * 0.36), middle + cell * 0.36) for at, middle in zip((x, y), centre, strict=True))
    return Thing(
        chance.choice(list(COLOURS)), chance.choice(SHAPES), place, x, y, radius, math.radians(chance.uniform(-9, 9))
    )


def side_of(seed: int, most: int = SIDES[1]) -> int:
    """How large the picture of a seed is; small ones are more frequent."""
    return round(SIDES[0] * math.pow(most / SIDES[0], random.Random(~seed).random()))


@lru_cache(maxsize=256)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


def draw(shown: Scene, side: int, fonts: Sequence[str]) -> Image.Image:
    """The picture of a scene, ``side`` pixels wide and high.

    Args:
        fonts: files that a digit's font is chosen from; an empty name is Pillow's own.
    """
    chance = random.Random(shown.noise)
    ground = _ground(chance)
    full = side * SMOOTH
    image = Image.new("RGB", (full, full), ground)
    pen = ImageDraw.Draw(image)
    for thing in shown.things:
        pen.polygon(
            [(x * full, y * full) for x, y in outline(thing)],
            fill=_shade(chance, thing.colour),
        )
    if shown.digit:
        _digit(pen, shown, chance, full, fonts)
    return image.resize((side, side), Image.Resampling.BOX)


def _ground(chance: random.Random) -> tuple[int, int, int]:
    """White, or a light tint of grey or colour."""
    light = chance.choice((255, chance.randint(225, 255), chance.randint(205, 240)))
    red, green, blue = (max(0, min(255, light + chance.randint(-10, 10))) for _ in range(3))
    return (255, 255, 255) if light == 255 else (red, green, blue)


def _shade(chance: random.Random, colour: str) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, part + chance.randint(-14, 14))) for part in COLOURS[colour])
    return red, green, blue


def outline(thing: Thing) -> list[tuple[float, float]]:
    """Corners of a shape."""
    if thing.shape == "circle":
        points = [(math.cos(a), math.sin(a)) for a in (math.tau * step / 48 for step in range(48))]
    elif thing.shape == "square":
        points = [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    elif thing.shape == "triangle":
        points = [(0, -0.95), (0.92, 0.75), (-0.92, 0.75)]
    elif thing.shape == "diamond":
        points = [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)]
    elif thing.shape == "cross":
        arm = 0.3
        quarter = [(arm, -0.95), (arm, -arm), (0.95, -arm)]
        points = [_turned(point, math.pi / 2 * step) for step in range(4) for point in quarter]
    else:
        points = [_turned((0, -1 if step % 2 == 0 else -0.42), math.pi / 5 * step) for step in range(10)]
    turned = [_turned(point, 0 if thing.shape == "circle" else thing.turn) for point in points]
    return [(thing.x + x * thing.radius, thing.y + y * thing.radius) for x, y in turned]


def _turned(point: tuple[float, float], angle: float) -> tuple[float, float]:
    x, y = point
    return x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)


def _digit(pen: ImageDraw.ImageDraw, shown: Scene, chance: random.Random, full: int, fonts: Sequence[str]) -> None:
    font = _font(chance.choice(list(fonts)), round(full * chance.uniform(0.45, 1.05)))
    left, top, right, bottom = pen.textbbox((0, 0), shown.digit, font=font)
    x = chance.uniform(0.04, 0.96) * (full - (right - left)) - left
    y = chance.uniform(0.04, 0.96) * (full - (bottom - top)) - top
    pen.text((x, y), shown.digit, font=font, fill=_shade(chance, shown.colour))
