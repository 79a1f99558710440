"""A server whose engine cannot be had back says so, and ends with an error: whoever started it starts it anew."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import httpx
import pytest

from benchmarks.live import free_port
from qwen_onnx.errors import WorkerDiedError
from qwen_onnx.runtime import QwenService, RemoteEngine
from qwen_onnx.runtime.engines.child import Patience
from qwen_onnx.runtime.server import app, logs
from qwen_onnx.runtime.server.settings import ServerSettings
from tests.fixtures.servers import until


class Frail(QwenService):
    """A service whose engine is given up after its first death."""

    def __init__(self, artifact: Path) -> None:
        super().__init__(artifact, threads=1)
        self.engine.close()
        self.remote = RemoteEngine(artifact, patience=Patience(most_deaths=1))
        self.engine = self.remote

    def kill(self) -> None:
        assert self.remote.pid is not None
        os.kill(self.remote.pid, signal.SIGKILL)
        until(lambda: self.stats().failed)


@pytest.mark.anyio
async def test_liveness_is_that_of_the_engine(tiny_artifact: Path) -> None:
    service = Frail(tiny_artifact)
    application = app.create_app(service, "tiny")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://x") as client:
        assert (await client.get("/health/live")).status_code == 200
        service.kill()
        answer = await client.get("/health/live")
        assert (answer.status_code, answer.json()["status"]) == (503, "failed")
        assert (await client.get("/health/ready")).status_code == 503
    service.close()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.slow
def test_a_server_without_an_engine_ends_with_an_error(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Frail(tiny_artifact)
    monkeypatch.setattr(app, "load_service", lambda *_: service)
    # it would take the log from the test
    monkeypatch.setattr(logs, "configure", lambda: None)
    port = free_port()

    def answers() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health/live", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def kill() -> None:
        until(answers)
        service.kill()

    killing = threading.Thread(target=kill)
    killing.start()
    with pytest.raises(WorkerDiedError, match="again and again"):
        app.serve(tiny_artifact, model_name="tiny", settings=ServerSettings(port=port))
    killing.join()
