"""A verification holds one copy of the artifact's weights at a time, and keeps to its bound of memory and disk."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

from benchmarks.synthetic import Size, write_checkpoint
from benchmarks.verify_memory import DISK, MEMORY, build, measure
from qwen_onnx.runtime.engines.batch.model import BatchModel
from qwen_onnx.runtime.engines.genai import Engine
from qwen_onnx.verify import Keep, VerifyOptions, verify_artifact
from qwen_onnx.verify.golden import GOLDEN, Golden
from qwen_onnx.verify.keeping import CONTINUATION
from qwen_onnx.verify.loaded import Loaded
from qwen_onnx.verify.scoring import Session
from tests.verify.test_verify import FAST, LIMITS

CHECKS = ("graph_parity", "drift", "kv_decode", "batched", "greedy")


class Copies:
    """Sees what loads an artifact come and go: the real classes, counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive: weakref.WeakSet[object] = weakref.WeakSet()
        self.loaded: list[str] = []
        self.together: list[set[str]] = []
        for kind in (Session, Engine, BatchModel):
            monkeypatch.setattr(kind, "__init__", self._counting(kind.__init__))

    def _counting(self, begin: Any) -> Any:
        def counted(item: object, *args: Any, **options: Any) -> None:
            gc.collect()
            self.alive.add(item)
            self.loaded.append(type(item).__name__)
            self.together.append({type(each).__name__ for each in self.alive})
            begin(item, *args, **options)
            assert len(self.alive) == 1, self.together[-1]

        return counted


def proven(artifact: Path, checkpoint: Path, folder: Path, **options: Any) -> Golden:
    chosen = VerifyOptions(checks=CHECKS, **{**FAST, **options})
    report = verify_artifact(artifact, checkpoint, None, LIMITS, options=chosen, keep=Keep(folder, "tiny", "0" * 64))
    faults = [item.detail for item in report.checks if "could not be carried out" in item.detail]
    assert not faults, faults
    return Golden.read(folder / GOLDEN)


@pytest.mark.slow
def test_one_copy_at_a_time(
    tiny_build: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = Copies(monkeypatch)
    proven(tiny_build, tiny_checkpoint, tmp_path)
    assert set(copies.loaded) == {"Session", "Engine", "BatchModel"}
    assert all(len(each) == 1 for each in copies.together), copies.together


@pytest.mark.release
def test_in_slices_no_engine_loads_the_whole(
    tiny_build: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = Copies(monkeypatch)
    golden = proven(tiny_build, tiny_checkpoint, tmp_path, layers_at_once=1)
    # the others are not made in slices
    assert set(copies.loaded) == {"Session"}
    assert any(stretch.domain == CONTINUATION and stretch.tokens > stretch.prompt for stretch, _ in golden)


def test_what_runners_hold_may_stay() -> None:
    both = Loaded(alone=False)
    first = both.get("scorer", object)
    both.get("engine", object)
    assert both.get("scorer", object) is first
    both.drop()
    assert both.get("scorer", object) is not first


LARGE = {"dense": Size(), "mixture": Size(layers=13, experts=32, intermediate=768)}


def assert_keeps_to_bound(folder: Path, size: Size, memory: int) -> dict[str, Any]:
    """At most the artifact's size and ``memory`` of anonymous memory, ``DISK`` of disk; everything was carried out."""
    write_checkpoint(folder / "checkpoint", size)
    artifact = build(folder / "checkpoint", folder / "built", size)
    options = {"window": 256, "windows_per_domain": 1}
    found = measure(folder / "checkpoint", artifact, folder / "scratch", options)
    assert not [text for text in found["verdicts"].values() if "could not be carried out" in text], found["verdicts"]
    assert found["anonymous_bytes"] <= found["artifact_bytes"] + memory, found
    assert found["disk_bytes"] <= DISK, found
    return found


@pytest.mark.release
@pytest.mark.parametrize("kind", LARGE)
def test_four_gigabytes_are_proven_within_the_bound(kind: str, tmp_path: Path) -> None:
    found = assert_keeps_to_bound(tmp_path, LARGE[kind], MEMORY)
    assert sum(path.stat().st_size for path in (tmp_path / "checkpoint").glob("*.safetensors")) > 4e9
    assert set(CHECKS) <= set(found["stages"])


def test_the_process_that_is_measured_has_no_pytorch() -> None:
    """It takes 200 MB, half of what the starter may have."""
    code = "import sys, qwen_onnx.verify.latency_worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
