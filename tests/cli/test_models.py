"""A model by its id, its address or its folder, wherever the command line takes one; and its artifact by the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qwen_onnx.cli.app import app
from qwen_onnx.cli.options import artifact_at
from qwen_onnx.errors import ConfigError, QwenOnnxError
from tests.conftest import make_tiny_checkpoint


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a checkpoint in it."""
    make_tiny_checkpoint(tmp_path / "My-Finetune", kind="qwen3")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_where_an_artifact_is_kept(folder: Path) -> None:
    for model, name in (
        ("starter", "starter"),
        ("./My-Finetune", "my-finetune"),
        (folder / "My-Finetune", "my-finetune"),
        ("Org/Name@v1", "org--name--v1"),
        ("Qwen/Qwen3-0.6B", "qwen3-0.6b"),
    ):
        assert run("where", model, "--precision", "int8").stdout.endswith(f"/artifacts/{name}/cpu-int8\n")
    assert isinstance(run("where", "a/b/c").exception, ConfigError)


def test_a_folder_is_planned_estimated_and_examined(folder: Path) -> None:
    plan = json.loads(run("plan", "./My-Finetune", "--full").stdout)
    assert plan["catalogued"] is False
    estimate = json.loads(run("plan", "./My-Finetune", "--estimate").stdout.splitlines()[-1])
    assert estimate["download"] == 0
    assert estimate["exact"] is True
    found = json.loads(run("doctor", "./My-Finetune", "--json").stdout)["findings"]
    assert any(finding["name"] == "memory for my-finetune" for finding in found)
    assert run("fetch", "./My-Finetune").stdout == f"{folder / 'My-Finetune'}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["plan", "./nowhere"], 4, "there is no such folder"),
        (["plan", "My-Finetune"], 2, "no model 'My-Finetune'"),
        (["optimize", "./My-Finetune", "--source", "./My-Finetune"], 2, "the model is a folder already"),
        (["plan", "./My-Finetune", "--recipe", "none.yaml"], 2, "none.yaml: there is no such file"),
        (["chat", "./My-Finetune"], 6, "not an artifact"),
    ],
)
def test_bad_input_is_one_clear_message(folder: Path, arguments: list[str], code: int, words: str) -> None:
    error = run(*arguments).exception
    assert isinstance(error, QwenOnnxError)
    assert error.exit_code == code
    assert words in str(error)


def test_an_artifact_by_its_model(folder: Path, repository: Path) -> None:
    for name in ("recipes", "pipelines"):
        (folder / name).symlink_to(repository / name)
    place = folder / "artifacts/my-finetune"

    def built(name: str) -> Path:
        (place / name).mkdir(parents=True)
        (place / name / "manifest.json").write_text("{}")
        return place / name

    assert artifact_at("./My-Finetune") == Path("My-Finetune"), "nothing is built"
    rejected = built("cpu-int4.rejected")
    with pytest.raises(ConfigError, match=r"no artifact of \./My-Finetune passed") as caught:
        artifact_at("./My-Finetune")
    assert "artifacts/my-finetune/cpu-int4.rejected" in (caught.value.hint or "")
    assert artifact_at(str(rejected)) == rejected, "by its path it is taken"
    good = built("cpu-int4")
    assert artifact_at("./My-Finetune") == good
    built("cpu-int8")
    with pytest.raises(ConfigError, match="several artifacts") as caught:
        artifact_at("./My-Finetune")
    assert "cpu-int4, artifacts/my-finetune/cpu-int8" in (caught.value.hint or "")
    shutil.rmtree(place)
    for text in ("starter", "artifacts/none", "a/b/c"):
        assert artifact_at(text) == Path(text)


@pytest.mark.slow
def test_make_takes_a_folder_too(folder: Path, repository: Path) -> None:
    """What make would run: the artifact has one safe name, whatever the model is called."""

    def planned(goal: str, model: str) -> str:
        tools = Path(sys.executable).parent.parent
        command = ["make", "-n", goal, f"MODEL={model}", f"VENV={tools}", "-o", f"{tools}/.ready"]
        return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout

    model = str(folder / "My-Finetune")
    assert f"qwen-onnx optimize '{model}'" in planned("optimize", model)
    assert "/artifacts/my-finetune/cpu-int4' --source" in planned("verify", model)
    assert "/artifacts/my-finetune/cpu-int4'" in planned("chat", model)
    assert "qwen-onnx serve 'artifacts/starter/cpu-int4'" in planned("serve", "starter")
    assert "qwen-onnx package '" in planned("package", "Org/Name")
    assert "/artifacts/org--name/cpu-int4" in planned("package", "Org/Name")
