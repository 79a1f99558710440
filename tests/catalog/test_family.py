"""The catalog against a dated list of the family: what Qwen published is a row, buildable or planned with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.schema import Row
from qwen_onnx.catalog.sources import HubSource

LISTS = sorted(Path(__file__).parent.glob("family-*.yaml"))
# issue 14: rows that need no code
BUILDABLE = (
    "CodeQwen1.5-7B",
    "CodeQwen1.5-7B-Chat",
    "QwQ-32B-Preview",
    "Qwen-AgentWorld-35B-A3B",
    "Qwen3-4B-SafeRL",
    "Qwen3-Coder-Next",
    "Qwen3-Coder-Next-Base",
    "Qwen3.6-27B",
    "Qwen3.6-35B-A3B",
    "Qwen3.8-27B",
    "Qwen3Guard-Gen-0.6B",
    "Qwen3Guard-Gen-4B",
    "Qwen3Guard-Gen-8B",
    "WebWorld-14B",
    "WebWorld-8B",
)


def rows_by_repository(repository: Path) -> dict[str, Row]:
    """Row by the name of its repository on Hugging Face Hub."""
    return {
        source.repo.removeprefix("Qwen/"): row
        for _, row in load_catalog(repository).rows.values()
        for source in row.sources
        if isinstance(source, HubSource) and source.kind == "huggingface"
    }


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_every_model_of_the_family_is_a_row(repository: Path, path: Path) -> None:
    listed = [name for names in yaml.safe_load(path.read_text())["models"].values() for name in names]
    assert len(listed) == len(set(listed)) >= 190
    assert sorted(set(listed) - set(rows_by_repository(repository))) == []


def test_what_is_a_row_and_no_code_is_buildable(repository: Path) -> None:
    rows = rows_by_repository(repository)
    assert {name: rows[name].planned for name in BUILDABLE} == dict.fromkeys(BUILDABLE)


def test_a_row_is_named_after_its_repository(repository: Path) -> None:
    assert LISTS
    for name, row in rows_by_repository(repository).items():
        assert row.id == name.lower(), "another name cannot be found by the one that people know"
