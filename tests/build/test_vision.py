"""A folder with a model that sees through the whole main job, and what comes out answers about a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_onnx.artifact.manifest import open_runnable
from qwen_onnx.runtime import QwenService
from qwen_onnx.runtime.service.generation import Attached, AttachedVideo, ChatPrompt, GenerationConfig
from qwen_onnx.sources.vision_config import PREPROCESSOR
from tests.conftest import run_cli
from tests.fixtures.clips import frames
from tests.fixtures.pictures import as_file, chart
from tests.fixtures.vision import ARCHITECTURES, HYBRIDS, MIXTURE, STACKED, make_vision_checkpoint


@pytest.mark.release
@pytest.mark.parametrize("architecture", [ARCHITECTURES[0], STACKED, MIXTURE, HYBRIDS[1]])
def test_a_folder_is_built_and_answers_about_a_picture(tmp_path: Path, architecture: str) -> None:
    """Through the INT4 pipeline of the CPU: quantised, packed, with encoder and embedding beside the decoder."""
    folder = make_vision_checkpoint(tmp_path / "tiny-vl", architecture)
    done = run_cli("optimize", folder, "--output", tmp_path / "artifact", "--no-verify")
    assert done.returncode == 0, done.stderr
    assert "nothing states the weights' licence" in done.stderr
    opened = open_runnable(tmp_path / "artifact")
    steps = [step["type"] for step in opened.manifest.plan.olive["passes"].values()]
    # experts beside a tower are quantised by the builder
    own = ["GenAIModelBuilder"] if architecture == MIXTURE else ["FisherGptq", "GenAIModelBuilder", "PackWeights"]
    assert steps == [*own, "VisionEncoder"]
    parts = {"vision.onnx", "embedding.onnx", "processor_config.json", "video_config.json"}
    assert parts <= opened.manifest.files.keys()
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    prompt = ChatPrompt([{"role": "user", "content": content}], pictures=[Attached(as_file(chart(90, 60)), "it")])
    with QwenService(tmp_path / "artifact", threads=1, streams=1) as service:
        assert service.sees
        assert service.generate(prompt, GenerationConfig(max_new_tokens=4)).completion_tokens > 0
        film = [AttachedVideo(tuple(map(as_file, frames(3, 90, 60))), "it")]
        prompt = ChatPrompt([{"role": "user", "content": [{"type": "video"}, content[1]]}], videos=film)
        assert service.generate(prompt, GenerationConfig(max_new_tokens=4)).completion_tokens > 0


def test_a_hybrid_without_its_preparation_of_pictures_reads_text(tmp_path: Path) -> None:
    folder = make_vision_checkpoint(tmp_path / "tiny-hybrid", HYBRIDS[0])
    assert "VisionEncoder" in run_cli("plan", folder).stdout
    (folder / PREPROCESSOR).unlink()
    done = run_cli("plan", folder)
    assert done.returncode == 0, done.stderr
    assert "GenAIModelBuilder" in done.stdout
    assert "VisionEncoder" not in done.stdout


def test_gpus_get_an_encoder_and_other_targets_say_why_not(tmp_path: Path) -> None:
    folder = make_vision_checkpoint(tmp_path / "tiny-vl")
    for target in ("cuda", "dml", "webgpu"):
        done = run_cli("plan", folder, "--target", target)
        assert done.returncode == 0, done.stderr
        assert "VisionEncoder" in done.stdout
    done = run_cli("plan", folder, "--target", "npu-qnn")
    assert done.returncode == 2
    assert "an NPU wants pictures of one size; the encoder takes any" in done.stderr


@pytest.mark.release
@pytest.mark.parametrize(
    ("architecture", "target", "precision"),
    [(ARCHITECTURES[0], "dml", "fp16"), (STACKED, "cuda", "fp16"), (STACKED, "webgpu", "int4")],
)
def test_a_folder_is_built_for_a_gpu_and_proven_on_the_cpu(
    tmp_path: Path, architecture: str, target: str, precision: str
) -> None:
    folder = make_vision_checkpoint(tmp_path / "tiny-vl", architecture)
    told = ("--target", target, "--precision", precision, "--output", tmp_path / "artifact")
    done = run_cli("optimize", folder, *told)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "artifact" / "report.json").read_text())
    assert report["verification"] == "numerics-on-cpu"
    made = {check["name"]: check["verdict"] for check in report["checks"]}
    assert {made[name] for name in ("kv_decode", "processing", "vision", "sight_parity", "sight")} == {"PASS"}
