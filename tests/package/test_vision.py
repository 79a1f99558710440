"""A model that sees as a package: whole, described for what it is, and loaded by onnxruntime-genai alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qwen_onnx.artifact.genai_config import GENAI_CONFIG
from qwen_onnx.artifact.processor_config import ImageSettings
from qwen_onnx.package.contents import SIDECAR
from qwen_onnx.package.foundry import write_foundry
from qwen_onnx.package.records import read_package
from qwen_onnx.package.rules import broken_rules
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.loading import EngineOptions, load_engine
from qwen_onnx.runtime.processing.images import prepare
from qwen_onnx.runtime.processing.template import TOKENIZER_CONFIG
from tests.conftest import run_cli
from tests.fixtures.pictures import noise
from tests.fixtures.sight import IMAGE, genai_answer
from tests.package.conftest import edit_json
from tests.runtime.engines.batch.test_engine import Heard

# builds an artifact
pytestmark = pytest.mark.slow


def test_the_package_says_that_it_sees(seeing_package: Path) -> None:
    """``packaged`` kept every rule, so that nothing of encoder and embedding is stray or missing."""
    told = json.loads((seeing_package / SIDECAR).read_text())
    assert told["string_properties"]["task"] == "vision-language-chat"
    assert told["string_properties"]["input_modalities"] == "text,image"
    parts = [path for name in ("model", "vision", "embedding") for path in seeing_package.glob(f"{name}.onnx*")]
    assert len(parts) == 6
    assert told["int_properties"]["filesize_mb"] == -(-sum(path.stat().st_size for path in parts) // 10**6)


def test_genai_answers_as_our_engine_does(seeing_package: Path, tmp_path: Path) -> None:
    # a picture that neither resizes
    image = noise(128, 64)
    ids, found = genai_answer(seeing_package, image, tmp_path / "picture.png", 6)
    picture = prepare(image, ImageSettings.read(seeing_package), where="it")
    assert ids.count(IMAGE) == picture.tokens
    engine = load_engine(seeing_package, EngineOptions(streams=1, capacity=128, threads=1))
    heard = Heard(engine, TokenRequest(tuple(ids), 6, stop_on_eos=False, media=(picture,)))
    assert heard.tokens() == found
    engine.close()


def test_a_part_that_is_missing_breaks_a_rule(seeing_package: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(seeing_package, tmp_path / seeing_package.name))
    (broken / "vision.onnx.data").unlink()
    assert broken_rules(broken) == {"external-data": ["vision.onnx.data is missing"]}
    (broken / "embedding.onnx").unlink()
    assert "readable" in broken_rules(broken)


def test_to_say_that_it_reads_text_alone_breaks_a_rule(seeing_package: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(seeing_package, tmp_path / seeing_package.name))
    edit_json(broken / SIDECAR, lambda data: data["string_properties"].update(input_modalities="text"))
    assert broken_rules(broken) == {"modalities": ["input_modalities is 'text', the model has 'text,image'"]}
    edit_json(broken / SIDECAR, lambda data: data["string_properties"].pop("input_modalities"))
    assert not broken_rules(broken), "Foundry Local itself says it where the package does not"


@pytest.mark.parametrize("task", ["chat-completion", "coding"])
def test_another_task_breaks_a_rule(seeing_package: Path, tmp_path: Path, task: str) -> None:
    broken = Path(shutil.copytree(seeing_package, tmp_path / seeing_package.name))
    edit_json(broken / SIDECAR, lambda data: data["string_properties"].update(task=task))
    assert broken_rules(broken) == {"task": [f"task is {task!r}, the model reads pictures"]}


def test_a_mixture_is_called_what_foundry_takes_pictures_for(seeing_package: Path, tmp_path: Path) -> None:
    """Of the two types onnxruntime-genai has one loop; Foundry Local knows the first alone."""
    mixture = Path(shutil.copytree(seeing_package, tmp_path / seeing_package.name))
    edit_json(mixture / GENAI_CONFIG, lambda data: data["model"].update(type="qwen3_5_moe"))
    edit_json(mixture / TOKENIZER_CONFIG, lambda data: data.update(tokenizer_class="Qwen3_5Tokenizer"))
    told = "type of genai_config.json is 'qwen3_5_moe', none of qwen2_5_vl, qwen3_vl, qwen3_5"
    assert broken_rules(mixture)["task"] == [told]
    write_foundry(mixture, read_package(mixture).record)
    assert json.loads((mixture / GENAI_CONFIG).read_text())["model"]["type"] == "qwen3_5"
    assert json.loads((mixture / TOKENIZER_CONFIG).read_text())["tokenizer_class"] == "Qwen2Tokenizer"
    assert not broken_rules(mixture)


def test_the_older_foundry_gets_none(seeing_build: Path, tmp_path: Path) -> None:
    done = run_cli("package", seeing_build, "--profile", "cli1", "--output", tmp_path, "--allow-unverified")
    assert done.returncode == 10
    assert "Foundry Local before 2.1 was not tried with a model that sees" in done.stderr
