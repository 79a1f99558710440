"""Two fresh clones in different folders build the same bytes, whatever the environment around them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_onnx.artifact.manifest import read_manifest
from tests.conftest import run_cli


def build_in_clone(repository: Path, clone: Path, checkpoint: Path, threads: int) -> tuple[Path, Path]:
    """Artifact and package of ``checkpoint``, made by the command line of a fresh clone."""
    subprocess.run(["git", "clone", "--quiet", str(repository), str(clone)], check=True)
    for name in ("home", "scratch"):
        (clone.parent / name).mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(clone),
        "HOME": str(clone.parent / "home"),
        "TMPDIR": str(clone.parent / "scratch"),
        "QWEN_ONNX_CACHE": str(clone / ".cache"),
        "PYTHONHASHSEED": str(threads),
        "OMP_NUM_THREADS": str(threads),
    }
    artifact = clone / "artifacts" / checkpoint.name / "cpu-int4"
    for arguments in (
        ("optimize", "starter", "--source", str(checkpoint), "--no-verify"),
        ("package", str(artifact), "--allow-unverified"),
    ):
        command = [sys.executable, "-m", "qwen_onnx.cli.app", *arguments]
        done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return artifact, Path(json.loads(done.stdout.splitlines()[-1])["path"])


@pytest.mark.release
def test_two_clones_build_the_same_bytes(repository: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    one = build_in_clone(repository, tmp_path / "a/qwen", tiny_checkpoint, threads=1)
    other = build_in_clone(repository, tmp_path / "another/much/longer/path/to/qwen-onnx", tiny_checkpoint, threads=2)
    for left, right in zip(one, other, strict=True):
        assert left.is_relative_to(tmp_path)
        done = run_cli("diff", left, right)
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["identical"] is True
        assert found["different"] == found["missing"] == 0
        # the log, the manifest with its time; the card of an artifact without figures has none
        assert found["measured"] <= 4
        for name in ("model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"):
            assert (left / name).read_bytes() == (right / name).read_bytes()
    manifest = read_manifest(one[0])
    assert manifest.checkout is not None
    assert not manifest.checkout.dirty
    for place in (one[1], other[1]):
        for file in place.iterdir():
            assert str(tmp_path).encode() not in file.read_bytes(), file
