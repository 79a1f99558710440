"""A package of the tiny model, and folders of it that a test may break."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_cli
from tests.fixtures.hearing import hearing_artifact
from tests.fixtures.vision import STACKED, make_vision_checkpoint

__all__ = ["hearing_artifact"]

NAME = "checkpoint-int4-generic-cpu-1"


def packaged(artifact: Path, output: Path, *options: str) -> Path:
    """The package that the verb makes of an artifact without a verdict."""
    done = run_cli("package", artifact, "--output", output, "--allow-unverified", *options)
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout.splitlines()[-1])["path"])


@pytest.fixture(scope="session")
def tiny_package(tiny_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packaged by the command line for the profile sdk2; not to be changed."""
    return packaged(tiny_build, tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="session")
def seeing_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL of random weights, not to be changed."""
    folder = tmp_path_factory.mktemp("seeing")
    checkpoint = make_vision_checkpoint(folder / "tiny-vl", STACKED, max_position_embeddings=4096)
    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    done = run_cli("optimize", checkpoint, "--precision", "fp32", "--output", folder / "artifact", "--no-verify")
    assert done.returncode == 0, done.stderr
    return folder / "artifact"


@pytest.fixture(scope="session")
def seeing_package(seeing_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its package, not to be changed."""
    return packaged(seeing_build, tmp_path_factory.mktemp("packages"))


@pytest.fixture
def broken(tiny_package: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_package, tmp_path / tiny_package.name))


def edit_json(path: Path, change: Any) -> None:
    """Load, change in place and write a JSON file."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
