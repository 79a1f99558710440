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

from qwen_onnx.bounded import read_bytes
from qwen_onnx.errors import EnvironmentFault, ExportError
from qwen_onnx.export.workfolder import OWN_TEXT
from qwen_onnx.files import sha256_of
from qwen_onnx.sources.chat import CheckpointTemplate

CALIBRATION_PACKAGES = ("email", "unittest", "xml", "concurrent", "asyncio", "json")
LONGEST_ANSWER = 1500  # characters
LONG_LINE = 50  # characters; what is shorter repeats by chance
# of a text that the user gives: a tokenizer takes about a hundred times as much memory
MOST_OWN_BYTES = 4_000_000
OWN_HINT = "give --calibration a text in UTF-8 of at most 4 MB, like what the model will read"


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


def read_own_text(file: Path) -> str:
    """A text of the user's to calibrate on.

    Raises:
        ExportError: it is empty, not UTF-8, not a plain file or larger than ``MOST_OWN_BYTES``.
    """
    body = read_bytes(file, most_bytes=MOST_OWN_BYTES, error=ExportError, hint=OWN_HINT)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as fault:
        what = f"{file.name} is not UTF-8 at byte {fault.start:,}"
        raise ExportError(what, where=str(file), hint=OWN_HINT) from fault
    if not text.strip():
        raise ExportError(f"{file.name} is empty", where=str(file), hint=OWN_HINT)
    return text


def own_text(digest: str | None) -> str | None:
    """The text that the build laid beside the pass; None where the options ask for none.

    Args:
        digest: SHA-256 of its UTF-8 bytes, from the options of the pass.

    Raises:
        ExportError: it is not there, or is another text.
    """
    if digest is None:
        return None
    file = Path(OWN_TEXT)
    if not file.exists() or sha256_of(file) != digest:
        raise ExportError(
            f"the calibration text with SHA-256 {digest[:12]}… is not there", hint="give that text with --calibration"
        )
    return file.read_bytes().decode("utf-8")


def calibration_ids(
    tokenizer: Any, windows: int, length: int, seed: int = 0, own: str | None = None
) -> list[list[int]]:
    """Token ids to calibrate on: in turn prose, code, conversations and sixteen languages.

    Args:
        tokenizer: of transformers; its chat template, if it has one, renders the conversations.
        windows: how many.
        length: tokens of each; fewer when the texts are shorter.
        seed: of the places where the windows begin.
        own: text of the user's, which every second window then comes from.

    Raises:
        SourceError: the chat template does not render, or was stopped.
        ExportError: ``own`` is shorter than a window.
    """
    prose = _ids(tokenizer, "\n\n".join(topics().values()))
    if tokenizer.chat_template:
        template = CheckpointTemplate(tokenizer)
        rendered = map(template.render, conversations())
        chats = _ids(tokenizer, "\n".join(rendered))
    else:
        chats = prose
    streams = [prose, _ids(tokenizer, code()), chats, _ids(tokenizer, multilingual())]
    if own is not None:
        mine = _ids(tokenizer, own)
        if len(mine) < length:
            raise ExportError(
                f"the calibration text has {len(mine)} tokens and a window takes {length}",
                hint=OWN_HINT,
            )
        streams = [stream for ours in streams for stream in (mine, ours)]
    draw = random.Random(seed)
    chosen = islice(cycle(streams), windows)
    begins = ((stream, draw.randrange(max(len(stream) - length, 1))) for stream in chosen)
    return [stream[begin : begin + length] for stream, begin in begins]


def _ids(tokenizer: Any, text: str) -> list[int]:
    """``tokenizer(text).input_ids``; by a tokenizer that can, without the offsets: a third of the time."""
    if not tokenizer.is_fast:
        return list(tokenizer(text).input_ids)
    return list(tokenizer.backend_tokenizer.encode_batch_fast([text])[0].ids)
