"""The engine's process: what happens when it dies, and errors that cross the pipe."""

from __future__ import annotations

import os
import pickle
import signal
import time
from pathlib import Path

import pytest

from qwen_onnx.errors import (
    ArtifactError,
    ConfigError,
    OverloadedError,
    PromptTooLongError,
    QwenOnnxError,
    RequestError,
    WorkerDiedError,
)
from qwen_onnx.runtime import RemoteEngine
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.remote import EngineOptions
from tests.runtime.engines.batch.test_engine import Heard, endless


@pytest.fixture(scope="module")
def remote(tiny_artifact: Path):  # type: ignore[no-untyped-def]
    """Two streams, one may wait."""
    running = RemoteEngine(tiny_artifact, EngineOptions(streams=2, queue_size=1, capacity=1024, threads=1))
    yield running
    running.close()


def test_requests_go_through_and_stop(remote: RemoteEngine) -> None:
    first = Heard(remote, endless((5, 6), 8)).tokens()
    assert len(first) == 8
    stopped = Heard(remote, endless((5, 6), 1000))
    stopped.next()
    stopped.handle.cancel()
    assert stopped.end().finish == "cancelled"
    assert remote.stats().running == 0
    assert remote.stats().alive


def test_refusals_come_at_the_call(remote: RemoteEngine) -> None:
    with pytest.raises(PromptTooLongError):
        remote.submit(TokenRequest((5,) * 2000, 1), lambda _: None)
    held = [Heard(remote, endless((5, 6), 900)) for _ in range(3)]
    with pytest.raises(OverloadedError):
        remote.submit(TokenRequest((5,), 1), lambda _: None)
    for one in held:
        one.handle.cancel()
        one.end()


def test_a_refusal_of_the_child_is_the_same_error(remote: RemoteEngine) -> None:
    error = Heard(remote, TokenRequest((5,), 4, grammar="start: [")).end().error
    assert isinstance(error, RequestError)
    assert error.where == "grammar"


def test_a_killed_process_is_noticed_said_and_replaced(remote: RemoteEngine, caplog: pytest.LogCaptureFixture) -> None:
    running = Heard(remote, endless((5, 6), 1000))
    running.next()
    assert remote.pid is not None
    os.kill(remote.pid, signal.SIGKILL)
    error = running.end().error
    assert isinstance(error, WorkerDiedError)
    assert "signal 9" in error.what
    for _ in range(600):
        try:
            assert len(Heard(remote, endless((5, 6), 8)).tokens()) == 8
            break
        except WorkerDiedError:
            time.sleep(0.1)
    else:
        pytest.fail("it was not started again")
    assert remote.stats().restarts == 1
    assert "died (signal 9); 1 requests are lost" in caplog.text


def test_what_cannot_be_loaded_keeps_its_words(tmp_path: Path, tiny_artifact: Path) -> None:
    (tmp_path / "genai_config.json").write_bytes((tiny_artifact / "genai_config.json").read_bytes())
    with pytest.raises(ArtifactError, match="cannot load the model"):
        RemoteEngine(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        QwenOnnxError("what", where="where", hint="hint"),
        PromptTooLongError("long"),
        OverloadedError("full", retry_after=7),
        ConfigError(["one", "two"], hint="mend them"),
    ],
)
def test_errors_survive_a_pipe(error: QwenOnnxError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.__dict__ == error.__dict__
