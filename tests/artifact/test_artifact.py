"""An artifact is whole or absent, and says what it is."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

from qwen_onnx.artifact import store
from qwen_onnx.artifact.manifest import (
    Artifact,
    SourceRecord,
    build_key,
    cached,
    open_artifact,
    publish,
    staged_manifest,
)
from qwen_onnx.artifact.store import build_lock, kept_folder, staging_folder
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import Plan, make_plan
from qwen_onnx.errors import ArtifactError, BuildLockedError, EnvironmentFault, ExportError
from qwen_onnx.files import RECORD_SUFFIX


@pytest.fixture(scope="module")
def plan(repository: Path) -> Plan:
    return make_plan(load_catalog(repository), "starter", "cpu")


def put(plan: Plan, target: Path, content: str, key: str = "k") -> Artifact:
    """Publish an artifact of one file."""
    with build_lock(target, wait=True), staging_folder(target) as staging:
        folder = staging / "artifact"
        folder.mkdir()
        (folder / "model.onnx").write_text(content)
        source = SourceRecord(origin="test", revision="1", files={})
        manifest = staged_manifest(
            folder,
            key=key,
            plan=plan,
            plan_digest=plan.digest,
            source=source,
            packages={},
            readback={},
            verdict="PASS",
            built_seconds=0.1,
        )
        return publish(folder, target, manifest)


def test_publish_and_open(plan: Plan, tmp_path: Path) -> None:
    target = tmp_path / "a/cpu-int4"
    put(plan, target, "one")
    opened = open_artifact(target)
    assert opened.manifest.plan.model_dump() == plan.model_dump()
    assert opened.manifest.plan.digest == plan.digest
    assert opened.manifest.size_bytes == 3
    put(plan, target, "two")
    assert (target / "model.onnx").read_text() == "two"
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == ["cpu-int4"]


def test_publishing_without_rename_exchange(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_exchange", lambda *_: False)
    put(plan, tmp_path / "a", "one")
    put(plan, tmp_path / "a", "two")
    assert (tmp_path / "a/model.onnx").read_text() == "two"


def test_an_artifact_set_aside_by_a_killed_process_comes_back(plan: Plan, tmp_path: Path) -> None:
    target = tmp_path / "a"
    put(plan, target, "one")
    os.rename(target, tmp_path / ".a.old")
    (tmp_path / ".a.staging-dead").mkdir()
    with build_lock(target, wait=True):
        assert open_artifact(target).manifest.key == "k"
        assert not (tmp_path / ".a.staging-dead").exists()


@pytest.mark.parametrize("fault", ["missing", "altered", "added", "no manifest", "damaged manifest", "no folder"])
def test_damaged_artifacts_are_refused_and_never_a_cache_hit(plan: Plan, tmp_path: Path, fault: str) -> None:
    target = tmp_path / "a"
    put(plan, target, "one")
    assert cached(target, ["k"])
    assert not cached(target, ["other key"])
    damage = {
        "missing": (target / "model.onnx").unlink,
        "altered": lambda: (target / "model.onnx").write_text("onE"),
        "added": lambda: (target / "extra").write_text("x"),
        "no manifest": (target / "manifest.json").unlink,
        "damaged manifest": lambda: (target / "manifest.json").write_text('{"key": 1}'),
        "no folder": lambda: shutil.rmtree(target),
    }
    damage[fault]()
    with pytest.raises(ArtifactError) as caught:
        open_artifact(target)
    assert caught.value.where
    assert "make optimize" in (caught.value.hint or "")
    assert not cached(target, ["k"])


def test_the_key_follows_plan_source_versions_and_exporter(plan: Plan) -> None:
    base = build_key(plan, "r", {"torch": "1"}, "x")
    limits = plan.limits.model_copy(update={"kld_mean": 0.1})
    others = [
        build_key(plan.model_copy(update={"limits": limits}), "r", {"torch": "1"}, "x"),
        build_key(plan, "s", {"torch": "1"}, "x"),
        build_key(plan, "r", {"torch": "2"}, "x"),
        build_key(plan, "r", {"torch": "1"}, "y"),
    ]
    assert len({base, *others}) == 5
    assert build_key(plan, "r", {"torch": "1"}, "x") == base


def _hold(target: Path, seconds: float, ready: object) -> None:
    with build_lock(target, wait=True):
        ready.set()  # type: ignore[attr-defined]
        time.sleep(seconds)


@pytest.mark.slow
def test_a_second_builder_waits_or_fails_clearly(plan: Plan, tmp_path: Path) -> None:
    target = tmp_path / "a"
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=_hold, args=(target, 1.5, ready))
    other.start()
    assert ready.wait(20)
    with pytest.raises(BuildLockedError, match="another process"), build_lock(target, wait=False):
        pass
    told: list[int] = []
    with build_lock(target, wait=True, waiting=lambda: told.append(1)):
        assert told == [1]
        assert not other.is_alive() or other.join(5) is None
    other.join()


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    target = tmp_path / "a"
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=_hold, args=(target, 60, ready))
    other.start()
    assert ready.wait(20)
    other.kill()
    other.join()
    with build_lock(target, wait=False):
        pass


def test_what_a_build_left_is_found_by_its_own_key_only(tmp_path: Path) -> None:
    target = tmp_path / "artifacts/a"

    def fail(key: str, name: str) -> None:
        with kept_folder(tmp_path, key, target) as kept:
            left.append(kept)
            (kept / name).write_text("x")
            raise ExportError("failed")

    def leave(key: str, name: str) -> Path:
        with pytest.raises(ExportError):
            fail(key, name)
        return left[-1]

    left: list[Path] = []

    assert not leave("one", "unfinished").exists()
    first = leave("one", f"layer{RECORD_SUFFIX}")
    with kept_folder(tmp_path, "one", tmp_path / "artifacts/b") as other:
        assert list(other.iterdir()) == []
    assert not other.exists()
    assert first.exists()
    with kept_folder(tmp_path, "one", target) as again:
        assert [path.name for path in again.iterdir()] == [f"layer{RECORD_SUFFIX}"]
    assert not first.exists()
    leave("one", f"layer{RECORD_SUFFIX}")
    with kept_folder(tmp_path, "two", target) as fresh:
        assert list(fresh.iterdir()) == []
        assert not first.exists()


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="disk is full"), staging_folder(tmp_path / "a"):
        Path("/dev/full").write_text("x" * 100_000)
    assert list(tmp_path.iterdir()) == []
