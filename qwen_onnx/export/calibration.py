"""Calibration text: from Python's own library and our own ``calibration.txt``, disjoint from what verification reads.

Verification owns the modules of ``verify.corpus.EVALUATION_SOURCES``, the topics of odd rank and its own
multilingual text; a test compares.
"""

from __future__ import annotations

import random
import sysconfig
from importlib import resources
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from qwen_onnx.errors import EnvironmentFault
from qwen_onnx.sources.chat import CheckpointTemplate

CALIBRATION_PACKAGES = ("email", "unittest", "xml", "concurrent", "asyncio", "json")
LONGEST_ANSWER = 1500  # characters
LONG_LINE = 50  # characters; what is shorter repeats by chance


def code() -> str:
    """Source of the calibration packages, one after the other.

    Raises:
        EnvironmentFault: this Python was installed without sources.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for name in CALIBRATION_PACKAGES for path in sorted((library / name).rglob("*.py"))]
    if not files:
        raise EnvironmentFault(
            "calibration reads sources of Python's library and there are none",
            where=str(library),
            hint="use a Python that has its .py files",
        )
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def topics() -> dict[str, str]:
    """Sections of Python's language reference of even rank, without those that repeat a section of odd rank."""
    from pydoc_data.topics import topics as every

    names = sorted(every)
    others = {line for name in names[1::2] for line in _long_lines(every[name])}
    return {name: every[name] for name in names[::2] if not others.intersection(_long_lines(every[name]))}


def _long_lines(text: str) -> set[str]:
    return {line for line in text.splitlines() if len(line) > LONG_LINE}


def conversations() -> list[list[dict[str, str]]]:
    """One question and answer for each topic."""
    return [
        [
            {"role": "user", "content": f"What does Python's reference say about {name.lower()}?"},
            {"role": "assistant", "content": text[:LONGEST_ANSWER]},
        ]
        for name, text in topics().items()
    ]


def multilingual() -> str:
    """Short everyday texts in sixteen languages, written for this project."""
    return resources.files("qwen_onnx.export").joinpath("calibration.txt").read_text(encoding="utf-8")


def calibration_ids(tokenizer: Any, windows: int, length: int, seed: int = 0) -> list[list[int]]:
    """Token ids to calibrate on: in turn prose, code, conversations and sixteen languages.

    Args:
        tokenizer: of transformers; its chat template, if it has one, renders the conversations.
        windows: how many.
        length: tokens of each; fewer when the texts are shorter.
        seed: of the places where the windows begin.

    Raises:
        SourceError: the chat template does not render, or was stopped.
    """
    prose = _ids(tokenizer, "\n\n".join(topics().values()))
    if tokenizer.chat_template:
        template = CheckpointTemplate(tokenizer)
        rendered = map(template.render, conversations())
        chats = _ids(tokenizer, "\n".join(rendered))
    else:
        chats = prose
    streams = (prose, _ids(tokenizer, code()), chats, _ids(tokenizer, multilingual()))
    draw = random.Random(seed)
    chosen = islice(cycle(streams), windows)
    begins = ((stream, draw.randrange(max(len(stream) - length, 1))) for stream in chosen)
    return [stream[begin : begin + length] for stream, begin in begins]


def _ids(tokenizer: Any, text: str) -> list[int]:
    """``tokenizer(text).input_ids``; by a tokenizer that can, without the offsets: a third of the time."""
    if not tokenizer.is_fast:
        return list(tokenizer(text).input_ids)
    return list(tokenizer.backend_tokenizer.encode_batch_fast([text])[0].ids)
