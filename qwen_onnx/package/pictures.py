"""Drawn pictures that ``foundry-check`` asks a model about, and what its answers must name."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image, ImageDraw

from qwen_onnx.artifact.processor_config import ImageSettings
from qwen_onnx.package.contents import Contents
from qwen_onnx.runtime.processing.images import tokens_of

# two pictures, one question: a model that sees neither cannot be right twice
QUESTION = "What color is the shape?"
SIDE, MARGIN = 336, 110
COLOURS = {"red": (220, 30, 30), "green": (34, 150, 52)}
# tokens of an answer; a model that reasons first names what it sees somewhere in its thoughts
ANSWER, THOUGHT = 32, 256
# a model made for Chinese may answer in it
WORDS = {"red": ("red", "红"), "green": ("green", "绿")}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
]
BLIND: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]


def square(colour: str) -> Image.Image:
    """A square of that colour on white."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(image).rectangle((MARGIN, MARGIN, SIDE - MARGIN, SIDE - MARGIN), fill=COLOURS[colour])
    return image


def asked_about(contents: Contents, tokens: int, blind: int) -> dict[str, Any]:
    """What ``sdk.seeing`` needs to ask and to judge; every picture has the same size, so the same ``tokens``.

    Args:
        tokens: of ``CONVERSATION``, in which the picture is one.
        blind: of ``BLIND``.
    """
    most = THOUGHT if contents.ints.get("supports_reasoning") else ANSWER
    settings = ImageSettings.read(contents.path)
    pictures = []
    for colour, words in WORDS.items():
        file = io.BytesIO()
        square(colour).save(file, "PNG")
        png = base64.b64encode(file.getvalue()).decode()
        pictures.append({"name": f"a {colour} square", "png": png, "words": words})
    return {
        "question": QUESTION,
        "pictures": pictures,
        "tokens": tokens - 1 + tokens_of(Image.new("RGB", (SIDE, SIDE)), settings, where="a drawn square"),
        "blind": blind,
        "most": most,
    }
