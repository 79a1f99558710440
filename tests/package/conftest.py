"""Packages for tests: of the tiny build, and of the tiny build with a report of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import run_cli


@pytest.fixture(scope="session")
def tiny_package(tiny_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny build, packaged by the command line."""
    return package(tiny_build, tmp_path_factory.mktemp("packages"))


def package(artifact: Path, folder: Path, *options: str) -> Path:
    """``artifact``, packaged below ``folder``; its own folder."""
    done = run_cli("package", artifact, "--output", folder, "--allow-unverified", *options)
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout.splitlines()[-1])["path"])


@pytest.fixture
def copied(tiny_package: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage, in a folder of the same name."""
    return Path(shutil.copytree(tiny_package, tmp_path / "copied" / tiny_package.name))
