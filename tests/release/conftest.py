"""Releases of the tiny checkpoint: nothing is measured, and every matrix here says so."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import run_cli
from tests.fixtures.recipes import write_recipe

Run = Callable[..., subprocess.CompletedProcess[str]]
TINY = {
    "models": ["starter"],
    "targets": ["cpu"],
    "precisions": ["int4"],
    "gates": {"unverified": "allow"},
    "packages": ["sdk2"],
    "memory": "3GB",
    "timeout": "5min",
}


def own_recipe(path: Path) -> Path:
    """A recipe of the user's own, which describes the tiny checkpoint as the model ``mine``."""
    return write_recipe(path, "Qwen2ForCausalLM", id="mine", parameters=92_000, context=8192)


def write_matrix(folder: Path, *entries: dict[str, Any]) -> Path:
    """A matrix of ``TINY`` with each of ``entries`` laid over it."""
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump({"version": 2, "matrix": [TINY | entry for entry in entries]}))
    return path


def last_line(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The line of JSON that a release ends with."""
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


def release_command(place: Path, checkpoint: Path, matrix: Path, *more: str, model: str = "starter") -> list[str]:
    """Arguments of a release at ``place``/release whose cache is ``place``/cache."""
    return ["release", str(matrix), "--output", str(place / "release"), "--source", f"{model}={checkpoint}", *more]


@pytest.fixture
def place(tmp_path: Path, tiny_build: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a release, in which the int4 artifact is built already, with a cache of its own."""
    shutil.copytree(tiny_build, tmp_path / "starter/cpu-int4")
    monkeypatch.setenv("QWEN_ONNX_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def run(place: Path, tiny_checkpoint: Path) -> Run:
    """``qwen-onnx release`` of the entries given, in ``place``."""

    def release(*entries: dict[str, Any], more: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return run_cli(*release_command(place, tiny_checkpoint, write_matrix(place, *entries), *more))

    return release
