"""The engine's process: what happens when it dies, and errors that cross the pipe."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
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
from qwen_onnx.runtime.engines.child import Patience
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.loading import EngineOptions
from qwen_onnx.runtime.service.generation import Sampling
from tests.fixtures.servers import until
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


SMALL = EngineOptions(streams=2, queue_size=1, capacity=1024, threads=1)


@pytest.fixture
def impatient(tiny_artifact: Path) -> Iterator[RemoteEngine]:
    """Takes a second of silence for late and five for hung; three deaths are too many."""
    running = RemoteEngine(tiny_artifact, SMALL, patience=Patience(late=1, hung=5, most_deaths=3))
    yield running
    running.close()


def signalled(engine: RemoteEngine, number: int) -> None:
    assert engine.pid is not None
    os.kill(engine.pid, number)


@pytest.mark.slow
def test_a_process_that_dies_twice_at_once_is_started_again(impatient: RemoteEngine) -> None:
    for restarts in (1, 2):
        signalled(impatient, signal.SIGKILL)
        until(lambda: impatient.stats().restarts >= restarts, 60)  # noqa: B023
    assert len(Heard(impatient, endless((5, 6), 8)).tokens()) == 8
    assert not impatient.stats().failed


@pytest.mark.slow
def test_a_process_that_always_dies_is_given_up_and_that_is_said(
    impatient: RemoteEngine, caplog: pytest.LogCaptureFixture
) -> None:
    for restarts in (1, 2, 3):
        until(lambda: impatient.stats().alive, 60)
        signalled(impatient, signal.SIGKILL)
        until(lambda: impatient.stats().restarts >= restarts or impatient.stats().failed, 60)  # noqa: B023
    stats = impatient.stats()
    assert (stats.failed, stats.alive) == (True, False)
    with pytest.raises(WorkerDiedError, match="not started any more"):
        impatient.submit(endless((5, 6), 8), lambda _: None)
    assert "died 3 times" in caplog.text


@pytest.mark.slow
def test_a_hung_process_is_noticed_and_replaced(impatient: RemoteEngine) -> None:
    running = Heard(impatient, endless((5, 6), 1000))
    running.next()
    stopped = impatient.pid
    signalled(impatient, signal.SIGSTOP)
    until(lambda: not impatient.stats().alive)
    with pytest.raises(WorkerDiedError):
        impatient.submit(endless((5, 6), 8), lambda _: None)
    assert isinstance(running.end().error, WorkerDiedError)
    until(lambda: impatient.stats().alive, 60)
    assert impatient.pid != stopped
    assert len(Heard(impatient, endless((5, 6), 8)).tokens()) == 8


def test_a_hung_process_holds_up_nobody(tiny_artifact: Path) -> None:
    """Whatever the size of what is asked: the pipe is full, but only a thread of its own waits for it."""
    engine = RemoteEngine(tiny_artifact, SMALL)
    signalled(engine, signal.SIGSTOP)
    large = endless((5, 6), 8, sampling=Sampling(logit_bias=dict.fromkeys(range(400_000), 1.0)))
    asking = threading.Thread(target=lambda: engine.submit(large, lambda _: None), daemon=True)
    asking.start()
    asking.join(timeout=20)
    looking = threading.Thread(target=engine.stats, daemon=True)
    looking.start()
    looking.join(timeout=20)
    blocked = asking.is_alive() or looking.is_alive()
    signalled(engine, signal.SIGKILL)
    engine.close()
    assert not blocked


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
