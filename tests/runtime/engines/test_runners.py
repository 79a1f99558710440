"""The child process of a runner, with an engine that is easy to see through: it counts."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from qwen_onnx import errors
from qwen_onnx.errors import ArtifactError, PromptTooLongError, VerificationError
from qwen_onnx.processes import children
from qwen_onnx.processes.environments import Interpreter
from qwen_onnx.runtime.engines.runners import worker
from qwen_onnx.runtime.engines.runners.client import Runner

VOCABULARY, CONTEXT, EOS = 8, 16, 7
COUNTING = '''
import os
import numpy as np

class Backend:
    """The token after n is n + 1; the last dimension carries how many tokens were read since the start."""

    def __init__(self, folder, threads):
        if not (folder / "weights").exists():
            raise OSError("no weights")
        self.read = 0

    def logits(self, ids):
        print("libraries print, too")
        rows = np.zeros((len(ids), 8), np.float32)
        rows[np.arange(len(ids)), (np.asarray(ids) + 1) % 8] = 1
        rows[:, 0] = -len(ids)
        return rows

    def start(self, ids):
        self.read = len(ids)
        return self.logits(ids)[-1]

    def step(self, token):
        self.read += 1
        if token == 5:
            raise RuntimeError("five is right out")
        if token == 6:
            print("about to die", file=__import__("sys").stderr)
            os._exit(3)
        row = self.logits([token])[-1]
        row[0] = -self.read
        return row
'''


@pytest.fixture
def interpreter(tmp_path: Path) -> Interpreter:
    """This Python with a package that holds the worker and the counting engine."""
    folder = tmp_path / "package/qwen_onnx/runtime/engines/runners"
    folder.mkdir(parents=True)
    shutil.copy(Path(worker.__file__), folder)
    processes = tmp_path / "package/qwen_onnx/processes"
    processes.mkdir()
    shutil.copy(Path(children.__file__), processes)
    shutil.copy(Path(errors.__file__), processes.parent)
    (folder / "counting.py").write_text(COUNTING)
    return Interpreter(Path(sys.executable), tmp_path / "package")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    folder.mkdir()
    options = {"filename": "model.onnx", "session_options": {"provider_options": []}}
    model = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "eos_token_id": EOS, "decoder": options}
    (folder / "genai_config.json").write_text(json.dumps({"model": model}))
    (folder / "weights").touch()
    return folder


@pytest.fixture
def runner(artifact: Path, interpreter: Interpreter):  # type: ignore[no-untyped-def]
    made = Runner(artifact, "counting", interpreter, threads=1)
    yield made
    made.close()


def test_logits_arrive_as_they_were_made(runner: Runner) -> None:
    found = runner.logits([1, 2, 3])
    assert found.dtype == np.float32
    assert found.shape == (3, VOCABULARY)
    assert found.argmax(-1).tolist() == [2, 3, 4]


def test_a_continuation_goes_token_by_token(runner: Runner) -> None:
    found = runner.forced_logits([1, 2], [3, 4])
    assert found.argmax(-1).tolist() == [3, 4, 5]
    assert found[:, 0].tolist() == [-2, -3, -4], "the engine did not keep what it had read"


def test_greedy_generation_ends_at_eos_or_passes_it_by(runner: Runner) -> None:
    assert list(runner.generate([1], max_new_tokens=3)) == [2, 3, 4]
    assert list(runner.generate([6], max_new_tokens=3)) == []
    assert len(list(runner.generate([6], max_new_tokens=1, stop_on_eos=False))) == 1


def test_a_failure_of_the_engine_is_told_and_the_next_request_answered(runner: Runner) -> None:
    with pytest.raises(VerificationError, match="counting failed: RuntimeError: five is right out"):
        runner.forced_logits([1], [5])
    assert runner.logits([1]).shape == (1, VOCABULARY)


def test_the_death_of_the_engine_is_told_with_its_last_words(runner: Runner) -> None:
    with pytest.raises(VerificationError, match=r"died \(exit 3\): about to die"):
        runner.forced_logits([1], [6])
    with pytest.raises(VerificationError, match="died"):
        runner.logits([1])


def test_what_does_not_load_is_an_artifact_error(artifact: Path, interpreter: Interpreter) -> None:
    (artifact / "weights").unlink()
    with pytest.raises(ArtifactError, match=r"counting cannot load the model.*no weights"):
        Runner(artifact, "counting", interpreter, threads=1)


def test_an_unknown_engine_is_an_artifact_error(artifact: Path, interpreter: Interpreter) -> None:
    with pytest.raises(ArtifactError, match="ModuleNotFoundError"):
        Runner(artifact, "guessing", interpreter, threads=1)


def test_more_than_the_context_is_refused(runner: Runner) -> None:
    with pytest.raises(PromptTooLongError):
        runner.forced_logits([1] * CONTEXT, [2])
