"""From a checkpoint to a pulled package that generates, with a verdict that was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import run_cli
from tests.publish.conftest import files_of, publish, pull


@pytest.mark.release
def test_a_measured_pass_is_published_and_comes_back(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """fp32 is exact, so that even random weights pass."""
    target = tmp_path / "fp32"
    arguments = ("--precision", "fp32", "--source", tiny_checkpoint, "--output", target)
    done = run_cli("optimize", "starter", *arguments)
    assert done.returncode == 0, done.stderr
    done = run_cli("package", target, "--output", tmp_path / "packages")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["verdict"] == "PASS"
    sent = publish(made["path"], f"oci:{tmp_path}/layout:v1")
    pull(f"oci:{tmp_path}/layout:v1", "--output", tmp_path / "got", "--expect", sent["digest"])
    assert files_of(tmp_path / "got") == files_of(Path(made["path"]))
    done = run_cli("generate", tmp_path / "got", "Hello", "--max-tokens", "2")
    assert done.returncode == 0, done.stderr
