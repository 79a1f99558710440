"""Environments of their own: made by real venv and pip, from a wheel on disk, without a network."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.errors import ConfigError, EnvironmentFault
from qwen_onnx.processes.environments import STAMP, Environment, Interpreter, interpreter_of, is_ready, place_of
from qwen_onnx.processes.progress import listening
from tests.conftest import edit_yaml


def wheel(folder: Path, name: str) -> str:
    """A package with one empty module."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", "")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return str(path)


def environment(*requirements: str, removed: dict[str, str] | None = None) -> Environment:
    return Environment(name="other", requirements=requirements, removed=removed or {}, bytes=1_000_000)


def run(interpreter: Interpreter, code: str) -> int:
    command = [str(interpreter.python), "-c", code]
    return subprocess.run(command, env=interpreter.variables, capture_output=True, check=False).returncode


@pytest.mark.slow
def test_it_has_its_own_packages_and_ours_but_none_of_those_beside_ours(tmp_path: Path) -> None:
    said: list[str] = []
    wanted = environment(wheel(tmp_path, "first"), wheel(tmp_path, "second"), removed={"second": "it is in the way"})
    with listening(said.append):
        made = interpreter_of(wanted, tmp_path)
    assert run(made, "import first, qwen_onnx") == 0
    assert run(made, "import second") != 0
    assert run(made, "import pydantic") != 0
    assert len(said) == 1
    with listening(said.append):
        assert interpreter_of(wanted, tmp_path) == made
    assert len(said) == 1, "it is there and was made again"


@pytest.mark.slow
def test_an_environment_that_another_checkout_made_runs_our_code(tmp_path: Path) -> None:
    wanted = environment(wheel(tmp_path, "first"))
    made = interpreter_of(wanted, tmp_path)
    shutil.rmtree(made.package)
    elsewhere = made.package.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / "qwen_onnx").symlink_to(tmp_path / "a checkout that is gone")
    assert run(interpreter_of(wanted, tmp_path), "import first, qwen_onnx") == 0


@pytest.mark.slow
def test_an_interrupted_installation_is_done_again(tmp_path: Path) -> None:
    wanted = environment(wheel(tmp_path, "first"))
    folder = place_of(wanted, tmp_path)
    folder.mkdir(parents=True)
    (folder / "half").touch()
    assert not is_ready(wanted, tmp_path)
    interpreter_of(wanted, tmp_path)
    assert (folder / STAMP).exists()
    assert not (folder / "half").exists()


@pytest.mark.slow
def test_what_pip_cannot_install_is_an_error_and_leaves_no_environment(tmp_path: Path) -> None:
    wanted = environment(str(tmp_path / "missing-1.0-py3-none-any.whl"))
    with pytest.raises(EnvironmentFault, match=r"other cannot be made: ERROR.*missing"):
        interpreter_of(wanted, tmp_path)
    assert not is_ready(wanted, tmp_path)


def test_other_requirements_are_another_environment(tmp_path: Path) -> None:
    assert place_of(environment("a==1"), tmp_path) != place_of(environment("a==2"), tmp_path)


def test_a_pipeline_names_an_environment_that_is_there(checkout: Path) -> None:
    edit_yaml(checkout / "pipelines/npu-openvino.yaml", lambda d: d.update(environment="opnvino"))
    with pytest.raises(ConfigError, match=r"npu-openvino\.yaml: environment: .* has no 'opnvino'"):
        load_catalog(checkout)


def test_an_environment_is_named_after_its_file(checkout: Path) -> None:
    edit_yaml(checkout / "pipelines/environments/openvino.yaml", lambda d: d.update(name="other"))
    with pytest.raises(ConfigError, match=r"environments/openvino\.yaml: name: is 'other'"):
        load_catalog(checkout)
