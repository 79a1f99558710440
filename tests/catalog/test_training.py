"""Options of a training: a file, overrides, and every fault of both."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_onnx.catalog.training import FILE, load_training
from qwen_onnx.errors import ConfigError
from tests.conftest import edit_yaml


def test_the_file_of_the_repository_is_that_of_the_guide(repository: Path) -> None:
    found = load_training(repository)
    assert (found.rank, found.alpha, found.dropout) == (16, 32, 0.1)
    assert found.targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert found.packing


def test_one_option_is_overridden(repository: Path) -> None:
    found = load_training(repository, overrides=["rank=8", "targets=[v_proj]", "learning_rate=1e-4", "every=null"])
    assert (found.rank, found.targets, found.learning_rate, found.every) == (8, ("v_proj",), 1e-4, None)


def test_every_fault_is_told_with_where_it_comes_from(checkout: Path) -> None:
    edit_yaml(checkout / FILE, lambda options: options.update(epochs=0, colour="red"))
    with pytest.raises(ConfigError) as caught:
        load_training(checkout, overrides=["dropout=1.5", "targets=[v_proj, v_proj]", "ranks=3"])
    faults = caught.value.faults
    assert any(fault.startswith(f"{FILE}: epochs:") for fault in faults)
    assert f"{FILE}: colour: unknown key" in faults
    assert any(fault.startswith("--set dropout:") for fault in faults)
    assert any(fault.startswith("--set targets:") and "twice" in fault for fault in faults)
    assert "--set ranks: unknown key" in faults
    assert len(faults) == 5


@pytest.mark.parametrize(
    ("override", "told"), [("rank", "not KEY=VALUE"), ("=3", "not KEY=VALUE"), ("rank=[", "not YAML")]
)
def test_what_is_no_override_is_told(repository: Path, override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_training(repository, overrides=[override])


def test_a_file_that_is_missing_or_no_mapping_is_told(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_training(repository, tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(ConfigError, match="not a mapping"):
        load_training(repository, tmp_path / "list.yaml")
    # a half of a file needs the rest
    (tmp_path / "half.yaml").write_text("name: half\nrank: 4\n")
    with pytest.raises(ConfigError, match="alpha: Field required"):
        load_training(repository, tmp_path / "half.yaml")
