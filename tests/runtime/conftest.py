"""A tiny random model behind the runtime's interfaces; tests of what it says use the starter (slow)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from openai import OpenAI

from benchmarks.live import free_port
from qwen_onnx.runtime import QwenService
from qwen_onnx.runtime.server.app import create_app
from qwen_onnx.runtime.server.settings import ServerSettings

# the tests of the API look at what lies beyond the limits too: at the context's end, at long answers
ROOMY = ServerSettings(max_input_characters=2_000_000, max_tokens=100_000)


@pytest.fixture(scope="session")
def service(tiny_artifact: Path) -> Iterator[QwenService]:
    """The tiny artifact in this process."""
    running = QwenService(tiny_artifact, threads=1)
    yield running
    running.close()


@pytest.fixture(scope="session")
def client(tiny_artifact: Path) -> Iterator[OpenAI]:
    """The real openai client against a real server with its engine in a child process."""
    with served(tiny_artifact, "tiny") as connected:
        yield connected


class served:
    """A server in a thread for the length of a with block."""

    def __init__(self, artifact: Path, name: str) -> None:
        port = free_port()
        self._app = create_app(QwenService(artifact, threads=2, isolated=True), name, ROOMY)
        self._server = uvicorn.Server(uvicorn.Config(self._app, port=port, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

    def __enter__(self) -> OpenAI:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self._client

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)
