"""Pictures and sounds of four kinds and a clip, drawn by code: the same on every machine, nobody's property."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

SEED, RATE = 20261128, 16_000


def pictures() -> dict[str, Image]:
    """By kind; of different sizes and ratios, with soft and with hard edges."""
    return {"photograph": _photograph(), "chart": _chart(), "document": _document(), "drawing": _drawing()}


def _photograph() -> Image:
    """Light that fades, and grain."""
    from PIL import Image

    rows, columns = np.mgrid[0:150, 0:230] / 100.0
    light = np.stack([np.sin(columns * 3) + rows, np.cos(rows * 2), columns - rows], axis=-1)
    grain = np.random.default_rng(SEED).normal(0, 0.1, light.shape)
    return Image.fromarray(np.clip((light + grain + 1.5) * 60, 0, 255).astype(np.uint8))


def _chart() -> Image:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (180, 120), "white")
    draw = ImageDraw.Draw(image)
    for index, colour in enumerate(("navy", "orange", "green", "crimson")):
        draw.rectangle((20 + 40 * index, 90 - 20 * index, 40 + 40 * index, 110), fill=colour)
    draw.line((10, 110, 175, 110), fill="black")
    return image


def _document() -> Image:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (130, 210), "ivory")
    draw = ImageDraw.Draw(image)
    for index, line in enumerate(("Invoice 4711", "Tea      3.20", "Bread    2.75", "Total    5.95")):
        draw.text((8, 12 + 30 * index), line, fill="black")
    return image


def _drawing() -> Image:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (90, 90), "lightblue")
    draw = ImageDraw.Draw(image)
    draw.ellipse((10, 10, 50, 50), fill="gold", outline="black")
    draw.polygon([(45, 80), (85, 80), (65, 40)], fill="brown")
    return image


def clip() -> list[Image]:
    """Frames of a ball that flies over a drawing; of an odd number, the last of which fills up a pair."""
    from PIL import ImageDraw

    found = []
    for index in range(5):
        image = _drawing().resize((140, 90))
        ImageDraw.Draw(image).ellipse((24 * index, 8 + 9 * index, 24 * index + 20, 28 + 9 * index), fill="crimson")
        found.append(image)
    return found


def sounds() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """By kind, at ``RATE``; of different lengths, with silence, with hard edges and without."""
    time = np.arange(3 * RATE) / RATE
    within = time % 0.25
    noise = np.random.default_rng(SEED).normal(0, 0.1, len(time))
    drawn = {
        # with its octave, as a string has it
        "tone": 0.4 * np.sin(2 * np.pi * 330 * time[: RATE // 2]) + 0.2 * np.sin(2 * np.pi * 660 * time[: RATE // 2]),
        "sweep": 0.5 * np.sin(2 * np.pi * (80 + 1000 * time) * time),
        "noise": (noise * np.exp(-time))[: 2 * RATE],
        # short ones, four a second, each rising
        "chirps": np.where(within < 0.1, 0.5 * np.sin(2 * np.pi * (1500 + 6000 * within) * within), 0),
    }
    return {kind: samples.astype(np.float32) for kind, samples in drawn.items()}
