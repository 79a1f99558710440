"""A command by a fork is the command by a process of its own."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from tests.conftest import fresh_cli, run_cli
from tests.fixtures import tools
from tests.fixtures.forks import Forks


@pytest.fixture(scope="module")
def own() -> Forks:
    """Of the environment as other tests have left it."""
    return Forks()


@pytest.fixture(autouse=True)
def forks(own: Forks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "FORKS", own)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["where", "starter"], ["plan", "startr"], ["no-such-verb"]],
    ids=" ".join,
)
def test_it_says_and_exits_as_a_fresh_process(arguments: list[str], checkout: Path) -> None:
    assert tools.FORKS.may_run()
    fork, fresh = (run(*arguments, cwd=checkout) for run in (run_cli, fresh_cli))
    assert (fork.returncode, fork.stdout, fork.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)
    assert fork.stdout or fork.stderr


@pytest.mark.slow
def test_it_has_the_environment_and_the_input_of_its_call(
    tiny_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importlib.import_module("onnxruntime_genai")
    monkeypatch.setenv("QWEN_ONNX_CACHE", str(tmp_path / "none"))
    assert tools.FORKS.may_run()
    fork, fresh = (
        run("chat", tiny_build, "--temperature", 0, "--max-tokens", 3, input="one\n/nonsense\n")
        for run in (run_cli, fresh_cli)
    )
    assert (fork.returncode, fork.stdout, fork.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)
    assert fork.stdout
    assert fork.returncode


def test_a_variable_that_imports_may_read_takes_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert not tools.FORKS.may_run()
    # "COLUMNS" is read when the module of the help is imported
    monkeypatch.setenv("COLUMNS", "300")
    assert max(map(len, run_cli("serve", "--help").stdout.splitlines())) == 300
    assert os.environ["COLUMNS"] == "300"
