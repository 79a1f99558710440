"""A folder with a model that hears through the whole main job, and what comes out answers about a sound."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_onnx.artifact.manifest import open_runnable
from qwen_onnx.runtime import QwenService
from qwen_onnx.runtime.service.generation import Attached, ChatPrompt, GenerationConfig
from tests.conftest import run_cli
from tests.fixtures.hearing import make_hearing_checkpoint
from tests.fixtures.sounds import as_sound, sweep
from tests.fixtures.speech import make_speech_checkpoint


@pytest.mark.release
@pytest.mark.parametrize("make", [make_hearing_checkpoint, make_speech_checkpoint])
def test_a_folder_is_built_and_answers_about_a_sound(tmp_path: Path, make: Callable[..., Path]) -> None:
    """Through the INT4 pipeline of the CPU and every check, with encoder and embedding beside the decoder.

    Of 288 tokens one stands for sounds, so that a random model draws it.
    """
    folder = make(tmp_path / "tiny-audio", max_position_embeddings=4096)
    done = run_cli("optimize", folder, "--output", tmp_path / "artifact")
    # a model of 64 dimensions may be too quick for its time to be told
    assert set(json.loads(done.stdout.splitlines()[-1])["not_passed"]) <= {"latency"}, done.stdout
    place = tmp_path / "artifact"
    place = place if place.exists() else place.with_name("artifact.rejected")
    opened = open_runnable(place)
    steps = [step["type"] for step in opened.manifest.plan.olive["passes"].values()]
    assert steps == ["FisherGptq", "GenAIModelBuilder", "PackWeights", "AudioEncoder"]
    assert {"audio.onnx", "embedding.onnx", "audio_config.json", "golden.npz"} <= opened.manifest.files.keys()
    content = [{"type": "audio", "audio_url": ""}, {"type": "text", "text": "What is it?"}]
    prompt = ChatPrompt([{"role": "user", "content": content}], sounds=[Attached(as_sound(sweep(1)), "it")])
    with QwenService(place, threads=1, streams=1) as service:
        assert service.hears
        assert service.generate(prompt, GenerationConfig(max_new_tokens=4)).completion_tokens > 0


def test_a_target_without_an_encoder_says_so(tmp_path: Path) -> None:
    done = run_cli("plan", make_hearing_checkpoint(tmp_path / "tiny-audio"), "--target", "cuda")
    assert done.returncode == 2
    assert "has no model type that hears and does not see" in done.stderr
