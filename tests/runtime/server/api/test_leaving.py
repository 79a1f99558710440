"""Clients that leave free their places; what is refused is refused before a stream begins."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen_onnx.errors import OverloadedError, RequestError
from qwen_onnx.runtime import GenerationConfig, QwenService
from qwen_onnx.runtime.server.app import create_app
from qwen_onnx.runtime.service.generations import Generations
from tests.fixtures.servers import ROOMY, in_thread

LONG = GenerationConfig(max_new_tokens=8000, logit_bias={1: -100})


@pytest.fixture(scope="module")
def small(tiny_artifact: Path) -> Iterator[QwenService]:
    """Two streams and two that wait."""
    with QwenService(tiny_artifact, threads=1, streams=2, queue_size=2) as running:
        yield running


@pytest.fixture(scope="module")
def port(small: QwenService) -> Iterator[int]:
    """Where a server of it listens."""
    with in_thread(create_app(small, "tiny", ROOMY), ROOMY) as port:
        yield port


def wait_for(small: QwenService, running: int) -> None:
    """Until so many answers run."""
    end = time.monotonic() + 20
    while small.stats().running != running or (running == 0 and small.stats().waiting):
        assert time.monotonic() < end, small.stats()
        time.sleep(0.01)


def post(port: int, path: str, body: dict[str, Any]) -> socket.socket:
    """A request whose answer is not read."""
    content = json.dumps({"model": "tiny", "max_tokens": 8000, "logit_bias": {"1": -100}, **body}).encode()
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(head.encode() + b"\r\n" + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 2}),
        ("completions", {"prompt": ["x", "y"]}),
    ],
)
def test_a_client_that_leaves_frees_its_places(
    small: QwenService, port: int, path: str, body: dict[str, Any], stream: bool
) -> None:
    connection = post(port, path, {**body, "stream": stream})
    wait_for(small, 2)
    before = small.stats().generated_tokens
    connection.close()
    wait_for(small, 0)
    assert small.stats().generated_tokens - before < 4000, "it went on to the end"


def test_clients_that_leave_while_they_wait_are_forgotten(small: QwenService, port: int) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]}
    first = post(port, "chat/completions", {**body, "n": 2, "stream": True})
    wait_for(small, 2)
    second = post(port, "chat/completions", body)
    third = post(port, "chat/completions", {**body, "stream": True})
    while small.stats().waiting < 2:
        time.sleep(0.01)
    full = {"model": "tiny", **body, "stream": True}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=full)
    assert answer.status_code >= 500, "an overload is told by the status line, also to those who want a stream"
    for connection in (third, second, first):
        connection.close()
    wait_for(small, 0)
    assert small.generate("x", GenerationConfig(max_new_tokens=1)).completion_tokens <= 1


def test_when_one_of_several_is_refused_none_runs(small: QwenService) -> None:
    jobs: Any = [([70], LONG)] * 3

    async def begin() -> None:
        running = await Generations.begin(small, jobs)
        try:
            with pytest.raises(OverloadedError):
                await Generations.begin(small, jobs)
        finally:
            running.cancel()
        with pytest.raises(RequestError, match="5 answers"):
            await Generations.begin(small, [*jobs, *jobs[:2]])

    asyncio.run(begin())
    wait_for(small, 0)
