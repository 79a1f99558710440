"""The starter's artifact, as `make optimize TARGET=cpu` leaves it: it answers, and the verdict is no rubber stamp."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import numpy_helper

from qwen_onnx.artifact.manifest import open_artifact
from qwen_onnx.runtime import GenerationConfig, QwenService
from qwen_onnx.verify import Verdict, VerifyOptions, verify_artifact
from qwen_onnx.verify.golden import GOLDEN
from tests.conftest import run_cli

pytestmark = pytest.mark.slow
ONLY_DRIFT = VerifyOptions(checks=("drift",))


def test_the_published_artifact_passed(artifact_dir: Path) -> None:
    manifest = open_artifact(artifact_dir).manifest
    assert manifest.verdict == "PASS"
    golden = (artifact_dir / GOLDEN).stat().st_size
    assert golden <= 8_000_000
    # no engine reads it
    assert manifest.size_bytes - golden <= 115_000_000
    report = json.loads((artifact_dir / "report.json").read_text())
    assert {item["verdict"] for item in report["checks"]} == {"PASS"}
    assert report["drift"]["positions"] >= 6000
    assert len(report["drift"]["domains"]) >= 3


def test_it_knows_paris(artifact_dir: Path) -> None:
    done = run_cli("generate", artifact_dir, "The capital of France is")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    with QwenService(artifact_dir) as model:
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        assert "Paris" in model.generate(chat, GenerationConfig(max_new_tokens=16)).text


def test_the_same_build_again_is_found(artifact_dir: Path) -> None:
    done = run_cli("optimize", "starter", "--target", "cpu", "--no-wait")
    assert done.returncode == 0, done.stderr
    assert "already built" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["verdict"] == "PASS"


@pytest.mark.release
def test_corrupted_scales_of_one_layer_fail(artifact_dir: Path, starter_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact_dir, tmp_path / "corrupted"))
    path = folder / "model.onnx"
    model = onnx.load(str(path))
    scales = [t for t in model.graph.initializer if "layers.15." in t.name and "scales" in t.name]
    assert len(scales) == 5, "qkv, o, gate, up, down"
    random = np.random.default_rng(0)
    for tensor in scales:
        values = random.permutation(numpy_helper.to_array(tensor).ravel()).reshape(tuple(tensor.dims))
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    (folder / "model.onnx.data").unlink()
    onnx.save(model, str(path), save_as_external_data=True, location="model.onnx.data")
    limits = open_artifact(artifact_dir).manifest.plan.limits
    report = verify_artifact(folder, starter_checkpoint, None, limits, options=ONLY_DRIFT)
    assert report.verdict is Verdict.FAIL


@pytest.mark.release
def test_plain_rounding_fails() -> None:
    """What `builder -p int4` gives by default: symmetric round-to-nearest."""
    done = run_cli("compare", "starter", "--only", "genai-rtn", "--no-speed")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["genai-rtn"]
    assert found["drift"] == "FAIL"
    assert found["kld_mean"] > 0.18


@pytest.mark.release
def test_verify_again_keeps_the_artifact(artifact_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact_dir, tmp_path / "copy"))
    done = run_cli("verify", copy)
    assert done.returncode == 0, done.stderr + done.stdout
    assert open_artifact(copy).manifest.verdict == "PASS"
    assert json.loads(done.stdout.splitlines()[-1])["verdict"] == "PASS"


@pytest.fixture(scope="module")
def dithered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dither") / "dithered"
    assert run_cli("fetch", "starter", "--dither", "0", "--output", folder).returncode == 0
    return folder


@pytest.mark.release
def test_dithered_weights_are_other_weights(artifact_dir: Path, dithered: Path) -> None:
    refused = run_cli("verify", artifact_dir, "--source", dithered)
    assert refused.returncode == 6
    assert "other weights" in refused.stderr


@pytest.mark.release
def test_the_default_recipe_passes_on_dithered_weights(dithered: Path) -> None:
    """No 4-bit grid fits these by luck, as it may fit the starter's own, which once were 4-bit."""
    target = dithered.parent / "int4"
    done = run_cli("optimize", "starter", "--source", dithered, "--output", target)
    assert done.returncode == 0, done.stderr + done.stdout


def test_serving_keeps_to_600_mb(artifact_dir: Path) -> None:
    """Memory of the engine's process after a long prompt, as the kernel counts it."""
    with QwenService(artifact_dir, threads=2, isolated=True) as model:
        model.generate("word " * 2000, GenerationConfig(max_new_tokens=64))
        children = [child.memory_info().rss for child in psutil.Process().children(recursive=True)]
    assert 100e6 < max(children) <= 600e6


@pytest.mark.release
@pytest.mark.parametrize("target", ["cuda", "webgpu"])
def test_int4_of_a_target_that_is_not_here_is_proven_by_its_numerics(target: str, tmp_path: Path) -> None:
    folder = tmp_path / "int4"
    done = run_cli("optimize", "starter", "--target", target, "--output", folder)
    assert done.returncode == 0, done.stderr + done.stdout
    claim = "proven: numerics on the CPU execution provider; not run on the device"
    assert claim in done.stdout
    assert open_artifact(folder).manifest.claim == claim
    report = json.loads((folder / "report.json").read_text())
    assert set(report["not_checked"]) == {"batched", "kv_int8", "latency", "memory"}
    assert {item["verdict"] for item in report["checks"]} == {"PASS"}
    assert report["latency"] is None
    assert report["drift"]["kld_mean"]["upper"] <= open_artifact(folder).manifest.plan.limits.kld_mean == 0.18
