"""Texts on which a model shall stay what it was while it learns something new: of all kinds that verification reads.

None of them is one that verification reads: code, reference and languages are calibration's, the rest stands in
``retained.txt``, where records are parted by a line with a percent sign and turns begin with their speaker.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

from qwen_onnx.export import calibration
from qwen_onnx.verify.corpus import SPEAKERS, docstrings

Message = dict[str, str]
# characters of a piece of code, of reference, of docstrings or of the texts in other languages
PIECE = 700
TURN = re.compile(r"^(User|Assistant): ", re.MULTILINE)
OWN = Path(__file__).with_suffix(".txt")


def retained(system: str, pieces: int = 16, seed: int = 0) -> Iterator[str | list[Message]]:
    """Plain texts and conversations.

    Args:
        system: message in front of every third conversation, which is told without it, too.
        pieces: of code and of reference, and half as many of docstrings.
    """
    for number, record in enumerate(OWN.read_text(encoding="utf-8").strip().split("\n%\n")):
        if not TURN.match(record):
            yield record
            continue
        talk = _turns(record)
        yield talk
        if number % 3 == 0:
            yield [{"role": "system", "content": system}, *talk]
    draw = random.Random(seed)
    code = calibration.code()
    for source, count in (
        (code, pieces),
        ("\n\n".join(calibration.topics().values()), pieces),
        ("\n\n".join(f"{name}: {text}" for name, text in docstrings(code)), pieces // 2),
    ):
        for _ in range(count):
            yield _piece(source, draw.randrange(len(source) - 2 * PIECE))
    languages = calibration.multilingual()
    for begin in range(0, len(languages), PIECE // 2):
        yield languages[begin : begin + PIECE // 2].strip()
    for talk in draw.sample(calibration.conversations(), pieces // 4):
        yield [{**turn, "content": turn["content"][:PIECE]} for turn in talk]


def _turns(record: str) -> list[Message]:
    _, *parts = TURN.split(record)
    return [
        {"role": SPEAKERS[name], "content": said.strip()} for name, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _piece(source: str, begin: int) -> str:
    """Whole lines from behind ``begin``."""
    start = source.index("\n", begin) + 1
    return source[start : start + PIECE].rstrip()
