"""docs/extending.md, done word for word in a copy of the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_onnx.artifact.manifest import open_artifact
from tests.conftest import make_tiny_checkpoint, rewrite_json
from tests.fixtures.dequantized import with_weights_of

# the collection that a line of Python goes into
INTO = {
    "qwen_onnx/runtime/engines/sampling.py": "    # adding one needs no other edit (docs/extending.md)\n",
    "qwen_onnx/export/architectures/registry.py": "ARCHITECTURES: dict[str, Architecture] = {\n",
    "qwen_onnx/catalog/architectures.py": "ARCHITECTURES: dict[str, Known] = {\n",
}


def blocks(repository: Path, language: str) -> list[str]:
    text = (repository / "docs/extending.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def extended(repository: Path, tmp_path: Path) -> Path:
    """The checkout with everything that the document adds, and a checkpoint of the new architecture."""
    for name in ("recipes", "pipelines", "qwen_onnx"):
        shutil.copytree(repository / name, tmp_path / name)
    for block in blocks(repository, "yaml"):
        name, _, text = block.removeprefix("# ").partition("\n")
        assert not (tmp_path / name).exists(), "the document adds files"
        (tmp_path / name).write_text(text)
    for block in blocks(repository, "python"):
        name, _, line = block.removeprefix("# ").partition("\n")
        if name in INTO:
            source = (tmp_path / name).read_text()
            assert source.count(INTO[name]) == 1
            (tmp_path / name).write_text(source.replace(INTO[name], INTO[name] + line))
        else:
            assert not (tmp_path / name).exists(), "the document adds files"
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(line)
    make_tiny_checkpoint(tmp_path / "checkpoint")
    rewrite_json(tmp_path / "checkpoint/config.json", architectures=["Qwen2TwinForCausalLM"])
    return tmp_path


def largest(extended: Path, name: str) -> float:
    """Of the weights of one matrix in the graph of an artifact."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(extended / "checkpoint")
    with_weights_of(model, extended / name / "model.onnx")
    return float(model.model.layers[0].mlp.down_proj.weight.detach().abs().max())


@pytest.mark.release
def test_the_walk_through_works(repository: Path, extended: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(extended)}
    [script] = blocks(repository, "sh")
    said = {}
    for command in script.splitlines():
        program = [sys.executable, "-m", "qwen_onnx.cli.app", *command.removeprefix("qwen-onnx ").split()]
        done = subprocess.run(program, cwd=extended, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        said[command.split()[1]] = done.stdout
    assert json.loads(said["plan"])["passes"]["quantize"]["type"] == "FisherGptq"
    lock = (extended / "recipes/plans.lock").read_text()
    assert re.search(r"^twin-tiny cpu int4 [0-9a-f]{64}$", lock, flags=re.MULTILINE)
    assert re.search(r"^twin-tiny cpu-fp32 fp32 [0-9a-f]{64}$", lock, flags=re.MULTILINE)
    assert re.search(r"^twin-tiny cpu-clipped int4 [0-9a-f]{64}$", lock, flags=re.MULTILINE)
    for name, form in (("twin-int4", "MatMulNBits"), ("twin-fp32", None), ("twin-clipped", "MatMulNBits")):
        manifest = open_artifact(extended / name).manifest
        assert manifest.plan.architecture == "Qwen2TwinForCausalLM"
        assert {row["form"] for row in manifest.readback["matrices"]} == ({form} if form else set())
    # clipped to half of the largest, and rounded to four bits
    assert largest(extended, "twin-clipped") < 0.7 * largest(extended, "twin-fp32")


def test_an_architecture_that_is_not_registered_is_told(repository: Path, checkout: Path) -> None:
    block = next(block for block in blocks(repository, "yaml") if "twin.yaml" in block)
    (checkout / "recipes/twin.yaml").write_text(block)
    program = [sys.executable, "-m", "qwen_onnx.cli.app", "plans"]
    done = subprocess.run(program, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'Qwen2TwinForCausalLM' cannot be exported" in done.stderr


# run where the document's field is: the draw, the checks, the API and the engines know it
EPSILON = """
import numpy as np
from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.chat.conversation import SETTINGS
from qwen_onnx.runtime.engines.batch.sampling import Sampler
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.sampling import BATCH_FEATURES, GENAI_FEATURES, Sampling
from qwen_onnx.runtime.server.api.chat_request import ChatRequest
from qwen_onnx.runtime.service.generation import GenerationConfig

logits = np.array([0, -1, -2], np.float32)
def drawn(**more):
    sampler = Sampler(TokenRequest((0,), 1, Sampling(temperature=1.0, seed=5, **more)))
    return {sampler.draw(logits)[0] for _ in range(200)}
assert drawn() == {0, 1, 2}
assert drawn(epsilon=0.2) == {0, 1}
assert drawn(epsilon=1.0) == {0}
field = ChatRequest.model_json_schema()["properties"]["epsilon"]
assert field["anyOf"][0] == {"maximum": 1.0, "minimum": 0.0, "type": "number"}, field
body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "epsilon": 0.5}
assert ChatRequest.model_validate(body).options()["epsilon"] == 0.5
assert "epsilon" in BATCH_FEATURES - GENAI_FEATURES and "epsilon" in SETTINGS
try:
    GenerationConfig(epsilon=1.5)
except RequestError as error:
    print(error.what)
"""


@pytest.mark.slow
def test_a_sampling_parameter_is_one_edit(extended: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(extended)}
    program = [sys.executable, "-c", EPSILON]
    done = subprocess.run(program, cwd=extended, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "epsilon is 1.5, not a number from 0.0 to 1.0"
