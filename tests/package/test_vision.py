"""A model that sees as a package: whole, described for what it is, and loaded by onnxruntime-genai alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qwen_onnx.artifact.processor_config import ImageSettings
from qwen_onnx.package.contents import SIDECAR
from qwen_onnx.package.rules import broken_rules
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.loading import EngineOptions, load_engine
from qwen_onnx.runtime.processing.images import prepare
from tests.conftest import run_cli
from tests.fixtures.pictures import noise
from tests.fixtures.sight import IMAGE, genai_answer
from tests.fixtures.vision import STACKED, make_vision_checkpoint
from tests.package.conftest import edit_json, packaged
from tests.runtime.engines.batch.test_engine import Heard

# builds an artifact
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeing")
    checkpoint = make_vision_checkpoint(folder / "tiny-vl", STACKED, max_position_embeddings=4096)
    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    done = run_cli("optimize", checkpoint, "--precision", "fp32", "--output", folder / "artifact", "--no-verify")
    assert done.returncode == 0, done.stderr
    return folder / "artifact"


@pytest.fixture(scope="module")
def package(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packaged(artifact, tmp_path_factory.mktemp("packages"))


def test_the_package_says_that_it_sees(package: Path) -> None:
    """``packaged`` kept every rule, so that nothing of encoder and embedding is stray or missing."""
    told = json.loads((package / SIDECAR).read_text())
    assert told["string_properties"]["task"] == "vision-language-chat"
    parts = [path for name in ("model", "vision", "embedding") for path in package.glob(f"{name}.onnx*")]
    assert len(parts) == 6
    assert told["int_properties"]["filesize_mb"] == -(-sum(path.stat().st_size for path in parts) // 10**6)


def test_genai_answers_as_our_engine_does(package: Path, tmp_path: Path) -> None:
    # a picture that neither resizes
    image = noise(128, 64)
    ids, found = genai_answer(package, image, tmp_path / "picture.png", 6)
    picture = prepare(image, ImageSettings.read(package), where="it")
    assert ids.count(IMAGE) == picture.tokens
    engine = load_engine(package, EngineOptions(streams=1, capacity=128, threads=1))
    heard = Heard(engine, TokenRequest(tuple(ids), 6, stop_on_eos=False, media=(picture,)))
    assert heard.tokens() == found
    engine.close()


def test_a_part_that_is_missing_breaks_a_rule(package: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(package, tmp_path / package.name))
    (broken / "vision.onnx.data").unlink()
    assert broken_rules(broken) == {"external-data": ["vision.onnx.data is missing"]}
    (broken / "embedding.onnx").unlink()
    assert "readable" in broken_rules(broken)


@pytest.mark.parametrize("task", ["chat-completion", "coding"])
def test_another_task_breaks_a_rule(package: Path, tmp_path: Path, task: str) -> None:
    broken = Path(shutil.copytree(package, tmp_path / package.name))
    edit_json(broken / SIDECAR, lambda data: data["string_properties"].update(task=task))
    assert broken_rules(broken) == {"task": [f"task is {task!r}, the model reads pictures"]}


def test_the_older_foundry_gets_none(artifact: Path, tmp_path: Path) -> None:
    done = run_cli("package", artifact, "--profile", "cli1", "--output", tmp_path, "--allow-unverified")
    assert done.returncode == 10
    assert "Foundry Local before 2.1 was not tried with a model that sees" in done.stderr
