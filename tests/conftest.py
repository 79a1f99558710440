"""Fixtures that every test folder shares. Nothing here needs a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import make_plan
from qwen_onnx.sources.fetch import cache_root, fetch
from tests.fixtures.adapters import adapters, slotted_artifact
from tests.fixtures.models import (
    drafting_artifact,
    exact_artifact,
    hybrid_artifact,
    long_artifact,
    make_tiny_checkpoint,
    pruned_artifact,
    tiny_artifact,
    tiny_build,
    tiny_checkpoint,
    tiny_unpacked,
)
from tests.fixtures.skips import pytest_make_collect_report, pytest_runtest_makereport
from tests.fixtures.tools import (
    REPOSITORY,
    as_in_a_terminal,
    edit_int4,
    edit_yaml,
    fresh_cli,
    rewrite_json,
    run_cli,
)

# fixtures and hooks are found, and tools are imported, from here
__all__ = [
    "REPOSITORY",
    "adapters",
    "as_in_a_terminal",
    "drafting_artifact",
    "edit_int4",
    "edit_yaml",
    "exact_artifact",
    "fresh_cli",
    "hybrid_artifact",
    "long_artifact",
    "make_tiny_checkpoint",
    "pruned_artifact",
    "pytest_make_collect_report",
    "pytest_runtest_makereport",
    "rewrite_json",
    "run_cli",
    "slotted_artifact",
    "tiny_artifact",
    "tiny_build",
    "tiny_checkpoint",
    "tiny_unpacked",
]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout under test."""
    return REPOSITORY


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of recipes and pipelines that a test may break."""
    for name in ("recipes", "pipelines"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def broken_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may break."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "broken"))


@pytest.fixture(scope="session")
def artifact_dir() -> Path:
    """The starter's artifact, as `make optimize TARGET=cpu` leaves it."""
    folder = REPOSITORY / "artifacts/starter/cpu-int4"
    if not folder.exists():
        pytest.fail("the starter's artifact is missing: make optimize TARGET=cpu")
    return folder


@pytest.fixture(scope="session")
def starter_checkpoint() -> Path:
    """The starter's checkpoint in the cache; fetched when it is not there."""
    catalog = load_catalog(REPOSITORY)
    return fetch(make_plan(catalog, "starter", "cpu"), cache_root(REPOSITORY)).path
