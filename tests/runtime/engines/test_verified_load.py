"""What is verified is what loads: at the start, while it loads, and when a new process replaces one that died."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from qwen_onnx.artifact.checksums import package_digest, write_sums
from qwen_onnx.artifact.seal import runnable_digest, verify_runnable
from qwen_onnx.errors import ArtifactError
from qwen_onnx.files import sha256_of
from qwen_onnx.runtime import QwenService, RemoteEngine
from qwen_onnx.runtime.engines import loading
from qwen_onnx.runtime.engines.child import Patience
from qwen_onnx.runtime.engines.loading import EngineOptions
from tests.conftest import run_cli
from tests.fixtures.servers import until


@pytest.fixture
def build(tiny_build: Path, tmp_path: Path) -> Path:
    """A copy that a test may alter."""
    return Path(shutil.copytree(tiny_build, tmp_path / "build"))


def alter(build: Path, *, consistently: bool = False) -> None:
    """Change a file, and what the manifest says of it too."""
    path = build / "tokenizer_config.json"
    path.write_text(path.read_text() + " ")
    if consistently:
        manifest = json.loads((build / "manifest.json").read_text())
        manifest["files"][path.name] = sha256_of(path)
        (build / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
@pytest.mark.parametrize("consistently", [False, True])
def test_an_engine_that_died_does_not_come_back_with_other_files(build: Path, consistently: bool) -> None:
    options = EngineOptions(streams=2, capacity=256, threads=1, verify=True)
    engine = RemoteEngine(build, options, patience=Patience(most_deaths=2))
    alter(build, consistently=consistently)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    until(lambda: engine.stats().failed or engine.stats().restarts > 0, 90)
    assert (engine.stats().failed, engine.stats().restarts) == (True, 0)
    engine.close()


def test_files_that_change_while_they_load_are_refused(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = loading.load_engine

    def swap(folder: Path, options: EngineOptions) -> object:
        """As who swaps a file for the time of the loading would: its bytes are the same before and after."""
        path = folder / "genai_config.json"
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        engine = load(folder, options)
        path.write_bytes(content)
        return engine

    monkeypatch.setattr(loading, "load_engine", swap)
    with pytest.raises(ArtifactError, match=r"genai_config\.json: changed while"):
        QwenService(build, threads=1, verify=True)


def test_the_expected_digest_is_required(build: Path) -> None:
    of_manifest = sha256_of(build / "manifest.json")
    assert verify_runnable(build, of_manifest.upper()).digest == of_manifest
    with pytest.raises(ArtifactError, match="not the expected"):
        verify_runnable(build, "0" * 64)
    # a package is known by its list, as verify-package says it
    write_sums(build)
    assert runnable_digest(build) == package_digest(build) != of_manifest
    with pytest.raises(ArtifactError, match="not the expected"):
        verify_runnable(build, of_manifest)
    alter(build)
    with pytest.raises(ArtifactError, match="altered"):
        verify_runnable(build, package_digest(build))


@pytest.mark.slow
def test_serve_refuses_what_is_not_expected(build: Path) -> None:
    done = run_cli("serve", build, "--port", 0, "--expect", "0" * 64)
    assert done.returncode == 6
    assert "not the expected" in done.stderr
