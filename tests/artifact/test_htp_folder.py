"""htp.json says what our export writes and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.artifact.htp.folder import DESCRIPTION, LARGEST, QDQ, HtpFolder
from qwen_onnx.artifact.htp.grid import Grid
from qwen_onnx.artifact.htp.static_decoder import Cache
from qwen_onnx.errors import ArtifactError, ExportError

GRIDS = {name: Grid(0.5, 7) for name in ("embeddings", "cos", "sin", "mask", "logits", "past_k.0", "past_v.0")}
CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no form": lambda facts: facts.pop("form"),
    "no cache": lambda facts: facts.pop("cache"),
    "no windows": lambda facts: facts.update(windows=[]),
    "another key": lambda facts: facts.update(command="x"),
    "another key of the cache": lambda facts: facts["cache"].update(command=1),
    "another form": lambda facts: facts.update(form="../x"),
    "a form that is not a text": lambda facts: facts.update(form=["qdq"]),
    "windows that are not numbers": lambda facts: facts.update(windows=["1"]),
    "a window below zero": lambda facts: facts.update(windows=[8, -1]),
    "too many layers": lambda facts: facts["cache"].update(layers=10**12),
    "a grid without a scale": lambda facts: facts["grids"]["mask"].pop("scale"),
    "a scale that is not a number": lambda facts: facts["grids"]["mask"].update(scale="x"),
    "an infinite scale": lambda facts: facts["grids"]["mask"].update(scale=float("inf")),
    "a zero beyond 16 bits": lambda facts: facts["grids"]["mask"].update(zero=1 << 16),
    "no grid of the cache": lambda facts: facts["grids"].pop("past_v.0"),
}


@pytest.fixture
def folder(tmp_path: Path) -> HtpFolder:
    made = HtpFolder(tmp_path, QDQ, (8, 1), 64, 288, Cache(1, 2, 63, 32), GRIDS)
    made.write()
    return made


def test_what_was_written_is_read(folder: HtpFolder) -> None:
    assert HtpFolder.read(folder.path) == folder


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_damaged_description_is_refused(folder: HtpFolder, change: Callable[[dict[str, Any]], Any]) -> None:
    place = folder.path / DESCRIPTION
    facts = json.loads(place.read_text())
    change(facts)
    place.write_text(json.dumps(facts))
    with pytest.raises(ArtifactError, match=r"htp\.json is damaged"):
        HtpFolder.read(folder.path)


@pytest.mark.parametrize("body", [b"", b"\xff", b"[]", b"7", b"[" * 100_000, b" " * (LARGEST + 1)])
def test_what_is_not_a_description_is_refused(folder: HtpFolder, body: bytes) -> None:
    (folder.path / DESCRIPTION).write_bytes(body)
    with pytest.raises(ExportError, match=r"htp\.json is damaged"):
        HtpFolder.read(folder.path, ExportError)
    (folder.path / DESCRIPTION).unlink()
    with pytest.raises(ArtifactError, match="missing"):
        HtpFolder.read(folder.path)
