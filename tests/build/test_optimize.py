"""The main job as users run it, on a tiny model: built whole, found again, or nothing left behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.artifact.manifest import open_artifact
from qwen_onnx.artifact.store import build_lock
from qwen_onnx.verify.report import load_report
from tests.conftest import edit_int4, edit_yaml, rewrite_json, run_cli
from tests.fixtures.architectures import make_checkpoint
from tests.fixtures.qwen1 import make_qwen1_checkpoint


def optimize(source: Path, target: Path, *more: str, **options: object) -> subprocess.CompletedProcess[str]:
    return run_cli("optimize", "starter", "--source", source, "--output", target, *more, **options)


def leftovers(folder: Path) -> list[str]:
    """What lies beside an artifact; the empty lock file and the note of its origin may stay."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith((".lock", ".origin.json")))


def test_the_built_artifact(tiny_build: Path) -> None:
    manifest = open_artifact(tiny_build).manifest
    assert manifest.verdict == "UNVERIFIED"
    assert {row["block_size"] for row in manifest.readback["matrices"]} <= {16, 32, 64}
    assert manifest.packages["onnxruntime-genai"]
    assert {"model.onnx", "genai_config.json", "tokenizer.json", "build.log"} <= set(manifest.files)
    assert leftovers(tiny_build.parent) == [tiny_build.name]


def test_the_same_job_again_is_a_cache_hit(tiny_build: Path, tiny_checkpoint: Path) -> None:
    before = (tiny_build / "manifest.json").stat().st_mtime_ns
    again = optimize(tiny_checkpoint, tiny_build, "--no-verify")
    assert again.returncode == 0, again.stderr
    assert "already built" in again.stderr
    assert (tiny_build / "manifest.json").stat().st_mtime_ns == before


def test_a_found_artifact_says_what_the_recipe_says_now(
    tiny_build: Path, tiny_checkpoint: Path, checkout: Path, tmp_path: Path
) -> None:
    """What a model is for changes no step of its build, but manifest, package and card state it."""
    target = Path(shutil.copytree(tiny_build, tmp_path / "int4"))
    before = open_artifact(target).manifest
    edit_yaml(checkout / "recipes/starter.yaml", lambda recipe: recipe["sizes"][0].update(languages=["tlh"]))
    again = optimize(tiny_checkpoint, target, "--no-verify", cwd=checkout)
    assert again.returncode == 0, again.stderr
    assert "already built" in again.stderr
    after = open_artifact(target).manifest
    assert after.about
    assert after.about.languages == ("tlh",)
    assert after == before.model_copy(update={"about": after.about})


@pytest.mark.release
def test_an_altered_artifact_is_refused_then_built_again(
    tiny_build: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(tiny_build), str(target)], check=True)
    rewrite_json(target / "genai_config.json", extra=1)
    refused = run_cli("generate", target, "Hello")
    assert refused.returncode == 6
    assert "genai_config.json was altered" in refused.stderr
    assert optimize(tiny_checkpoint, target, "--no-verify").returncode == 0
    open_artifact(target)


@pytest.mark.slow
def test_a_verdict_other_than_pass_publishes_beside_the_target(
    checkout: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    edit_int4(checkout / "pipelines/cpu.yaml", lambda pipeline: pipeline["limits"].update(decode_speedup=1000.0))
    target = tmp_path / "out/int4"
    done = optimize(tiny_checkpoint, target, cwd=checkout)
    assert done.returncode == 7, done.stderr
    assert "the verdict is FAIL" in done.stderr
    assert "report.html" in done.stderr
    assert leftovers(target.parent) == ["int4.rejected"]
    assert open_artifact(tmp_path / "out/int4.rejected").manifest.verdict == "FAIL"
    assert (tmp_path / "out/int4.rejected/report.html").stat().st_size > 10_000


@pytest.mark.release
def test_a_deeper_verification_measures_a_built_artifact_again(
    tiny_build: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(tiny_build, tmp_path / "int4"))
    # a random model may fail its limits; what counts here is how much was measured
    assert run_cli("verify", target, "--source", tiny_checkpoint).returncode in (0, 7)
    quick = load_report(target)
    assert quick.drift
    assert "verifying again" not in optimize(tiny_checkpoint, target).stderr
    assert "verifying again (depth: release)" in optimize(tiny_checkpoint, target, "--depth", "release").stderr
    deep = load_report(target)
    assert deep.drift
    assert (quick.options.depth, deep.options.depth) == ("quick", "release")
    assert deep.drift.positions > 4 * quick.drift.positions
    assert {domain.name for domain in deep.drift.domains} == {domain.name for domain in quick.drift.domains}
    assert "verifying again" not in optimize(tiny_checkpoint, target, "--depth", "release").stderr


@pytest.mark.slow
def test_a_failure_inside_olive_is_an_error_with_its_log(checkout: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def smaller(pipeline: dict) -> None:  # type: ignore[type-arg]
        del pipeline["steps"][0]["config"]["bits_per_weight"]
        pipeline["steps"][0]["config"]["max_bytes"] = 1000

    edit_int4(checkout / "pipelines/cpu.yaml", smaller)
    target = tmp_path / "out/int4"
    done = optimize(tiny_checkpoint, target, "--no-verify", cwd=checkout)
    assert done.returncode == 5
    assert "keeps to the bound; least: " in done.stderr
    log = Path(done.stderr.split("where: ")[1].splitlines()[0])
    assert "Traceback" in log.read_text()
    assert leftovers(target.parent) == []


@pytest.mark.slow
def test_a_graph_that_is_not_what_was_asked_for_is_refused(
    checkout: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    edit_int4(
        checkout / "pipelines/cpu.yaml", lambda pipeline: pipeline["readback"].update(block_size=128, finer_blocks=[])
    )
    target = tmp_path / "out/int4"
    done = optimize(tiny_checkpoint, target, "--no-verify", cwd=checkout)
    assert done.returncode == 5
    assert "block_size" in done.stderr
    assert leftovers(target.parent) == []


EXPERTS = {"bits": 4, "block_size": 64, "finer_blocks": [32, 16], "symmetric": False}


@pytest.mark.release
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("QWenLMHeadModel", {}),
        ("Qwen3MoeForCausalLM", {"readback.experts": EXPERTS}),
        ("Qwen3_5ForConditionalGeneration", {}),
    ],
)
def test_the_default_pipeline_builds_other_architectures(
    checkout: Path, tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    def other(recipe: dict[str, Any]) -> None:
        recipe["architecture"] = architecture
        row = recipe["sizes"][0] | {"context": 512, "parameters": 100_000, "targets": {}}
        row.pop("shape", None)
        if changes:
            row["targets"] = {
                "cpu": {
                    "why": "the operator of the experts has blocks of its own",
                    "precisions": ["int4"],
                    "set": changes,
                }
            }
        recipe["sizes"][0] = row

    edit_yaml(checkout / "recipes/starter.yaml", other)
    make = make_qwen1_checkpoint if architecture == "QWenLMHeadModel" else partial(make_checkpoint, architecture)
    target = tmp_path / "out/int4"
    done = optimize(make(tmp_path / "checkpoint"), target, "--no-verify", cwd=checkout)
    assert done.returncode == 0, done.stderr
    manifest = open_artifact(target).manifest
    assert manifest.plan.architecture == architecture
    found = manifest.readback["experts"]
    assert sum(kind["count"] for kind in found) == (2 if changes else 0)
    for kind in found:
        assert (kind["bits"], kind["symmetric"], kind["accuracy_level"]) == (4, False, 4)
        assert kind["block_size"] in (64, 32, 16)


@pytest.mark.slow
def test_a_second_build_fails_clearly_or_waits(tiny_build: Path, tiny_checkpoint: Path) -> None:
    with build_lock(tiny_build, wait=False):
        refused = optimize(tiny_checkpoint, tiny_build, "--no-verify", "--no-wait")
        assert refused.returncode == 6
        assert "another process is building" in refused.stderr
        command = [sys.executable, "-m", "qwen_onnx.cli.app", "optimize", "starter", "--no-verify"]
        command += ["--source", str(tiny_checkpoint), "--output", str(tiny_build)]
        waiting = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert waiting.stderr
        assert "not in the catalogue" in waiting.stderr.readline()
        assert "waiting" in waiting.stderr.readline()
        assert waiting.poll() is None
    _, said = waiting.communicate(timeout=120)
    assert waiting.returncode == 0
    assert "already built" in said


@pytest.fixture
def small_disk(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A file system of one megabyte."""
    yield from _mounted(tmp_path, "1m")


def _mounted(tmp_path: Path, size: str):  # type: ignore[no-untyped-def]
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_too_small_a_disk_is_refused_before_any_work(small_disk: Path, tiny_checkpoint: Path) -> None:
    done = optimize(tiny_checkpoint, small_disk / "int4", "--no-verify")
    assert done.returncode == 3
    assert "GB of disk" in done.stderr
    assert "--output" in done.stderr


@pytest.mark.slow
def test_a_disk_that_runs_full_leaves_nothing(large_disk: Path, tiny_checkpoint: Path) -> None:
    """Another program takes the room that the estimate saw."""
    command = [sys.executable, "-m", "qwen_onnx.cli.app", "optimize", "starter", "--no-verify"]
    command += ["--source", str(tiny_checkpoint), "--output", str(large_disk / "int4")]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert child.stderr
    assert any("Olive: quantize" in line for line in child.stderr)
    free = shutil.disk_usage(large_disk).free
    (large_disk / "filler").write_bytes(bytes(free - (64 << 10)))
    _, said = child.communicate(timeout=200)
    assert child.returncode == 3, said
    assert "the disk is full" in said
    assert leftovers(large_disk) == ["filler"]


@pytest.fixture
def large_disk(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A file system of 64 megabytes."""
    yield from _mounted(tmp_path, "64m")


def test_a_model_that_cannot_fit_is_refused_before_any_download(tmp_path: Path) -> None:
    done = run_cli("optimize", "qwen2.5-72b-instruct", "--output", tmp_path / "int4")
    assert done.returncode == 3, done.stderr
    assert "GB of memory" in done.stderr
    assert "--estimate" in done.stderr
    assert "--no-verify" in done.stderr
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_a_killed_build_goes_on_with_its_finished_layers(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN_ONNX_CACHE", str(tmp_path / "cache"))
    target = tmp_path / "out/int4"
    command = [sys.executable, "-m", "qwen_onnx.cli.app", "optimize", "starter", "--no-verify"]
    command += ["--source", str(tiny_checkpoint), "--output", str(target)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert child.stderr
    assert any("backward through layer 1 of 2, about" in line for line in child.stderr)
    child.send_signal(signal.SIGKILL)
    child.wait()
    [kept] = (tmp_path / "cache/work").iterdir()
    assert (kept / "grids-0001.safetensors").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "backward through layer 2 of 2" in again.stderr
    assert "backward through layer 1 of 2" not in again.stderr
    assert "forward through" not in again.stderr
    open_artifact(target)
    assert list((tmp_path / "cache/work").iterdir()) == []


@pytest.mark.release
@pytest.mark.parametrize("kills", [2, 20])
def test_kill_9_at_any_moment_leaves_the_old_artifact_or_the_new(
    kills: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Kills that a seeded generator spreads over the length of a build."""
    target = tmp_path / "int4"
    command = [sys.executable, "-m", "qwen_onnx.cli.app", "optimize", "starter", "--no-verify", "--force"]
    command += ["--source", str(tiny_checkpoint), "--output", str(target)]
    started = time.monotonic()
    subprocess.run([*command[:-1], str(tmp_path / "measured")], check=True, capture_output=True)
    length = time.monotonic() - started
    draw = random.Random(20261124)
    whole = 0
    # the first comes early: on a machine that is faster by now than while it was measured, too
    for share in (0.3, *(draw.uniform(0.05, 1.05) for _ in range(kills - 1))):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            child.wait(timeout=share * length)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
        child.wait()
        if target.exists():
            open_artifact(target)
            whole += 1
    subprocess.run(command, check=True, capture_output=True)
    open_artifact(target)
    assert sorted(leftovers(tmp_path)) == ["int4", "measured"]
    assert whole < kills, "no kill came before the first artifact was whole: the test tests nothing"
