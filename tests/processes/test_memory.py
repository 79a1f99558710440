"""What a process may take is what its control groups leave, where that is less than the machine has."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from qwen_onnx.processes import memory
from qwen_onnx.processes.memory import free_memory, total_memory

MB = 1 << 20


def group(folder: Path, version: int, limit: str, used: int, pages: int) -> None:
    """A control group's files as the kernel writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    for name, text in zip(names, (limit, str(used)), strict=True):
        (folder / name).write_text(f"{text}\n")
    prefix = "total_" if version == 1 else ""
    stat = {"cache": pages, "inactive_file": 1, "active_file": 1} if version == 1 else {"anon": 1, "file": pages}
    stat |= {f"{prefix}inactive_file": pages // 2, f"{prefix}active_file": pages - pages // 2}
    (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "OWN", tmp_path / "own")
    return tmp_path


def test_the_tightest_group_of_version_2_counts(groups: Path) -> None:
    (groups / "own").write_text("0::/jobs/one\n")
    group(groups / "groups/jobs", 2, str(200 * MB), 150 * MB, 20 * MB)
    group(groups / "groups/jobs/one", 2, str(100 * MB), 10 * MB, 0)
    assert free_memory() == 70 * MB, "of the group above, whose pages of files can be dropped"
    assert total_memory() == 100 * MB
    group(groups / "groups/jobs/one", 2, "max", 10 * MB, 0)
    assert total_memory() == 200 * MB


def test_version_1_counts_beside_an_empty_version_2(groups: Path) -> None:
    (groups / "own").write_text("9:cpu,cpuacct:/jobs\n4:memory:/jobs\n0::/\n")
    group(groups / "groups/memory/jobs", 1, str(90 * MB), 80 * MB, 30 * MB)
    assert (free_memory(), total_memory()) == (40 * MB, 90 * MB)
    group(groups / "groups/memory/jobs", 1, str(90 * MB), 95 * MB, 0)
    assert free_memory() == 0


def test_a_container_sees_its_own_group_as_the_root(groups: Path) -> None:
    (groups / "own").write_text("4:memory:/docker/0123\n")
    group(groups / "groups/memory", 1, str(60 * MB), 20 * MB, 0)
    assert free_memory() == 40 * MB


@pytest.mark.parametrize("own", [None, "0::/\n", "4:memory:/gone\n0::/gone\n"])
def test_without_a_limit_it_is_the_machines(groups: Path, own: str | None) -> None:
    if own is not None:
        (groups / "own").write_text(own)
    group(groups / "groups/memory", 1, "9223372036854771712", 20 * MB, 0)
    assert total_memory() == psutil.virtual_memory().total
    assert 0 < free_memory() < total_memory()
