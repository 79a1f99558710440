"""A guarded server in a thread, and raw HTTP to throw at it."""

from __future__ import annotations

import contextlib
import io
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks.live import free_port
from qwen_onnx.runtime import QwenService
from qwen_onnx.runtime.server.app import create_app
from qwen_onnx.runtime.server.listening import Server, make_config
from qwen_onnx.runtime.server.logs import Formatter
from qwen_onnx.runtime.server.settings import ServerSettings

CHAT = "/v1/chat/completions"


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, **changes}


class Guarded:
    """A client of a running server; ``log`` is what it has logged."""

    def __init__(self, port: int, log: io.StringIO) -> None:
        self.port, self.log = port, log
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)

    def ask(self, key: str | None = None, **changes: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return self.http.post(CHAT, json=body(**changes), headers=headers)


@contextlib.contextmanager
def guarded(
    artifact: Path, settings: ServerSettings, *, options: dict[str, Any] | None = None, **more: Any
) -> Iterator[Guarded]:
    """Serve ``artifact`` as ``qwen-onnx serve`` does, but in a thread."""
    service = QwenService(artifact, **{"threads": 1, "isolated": True, **(options or {})})
    port = free_port()
    settings = settings.model_copy(update={"port": port})
    server = Server(
        make_config(create_app(service, "tiny", settings, **more), settings), lambda port: None, lambda: None
    )
    thread = threading.Thread(target=server.run, daemon=True)
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(Formatter())
    root = logging.getLogger()
    kept = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    thread.start()
    try:
        until(lambda: server.started)
        client = Guarded(port, log)
        with client.http:
            yield client
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        root.removeHandler(handler)
        root.setLevel(kept)
    assert not thread.is_alive()


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for what must come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def request(
    content: bytes, *, head: bytes = b"", path: str = CHAT, method: str = "POST", length: int | None = None
) -> bytes:
    """A request as bytes, which asks to close the connection."""
    size = len(content) if length is None else length
    lines = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {size}\r\n"
    kind = b"" if b"ontent-" in head else b"Content-Type: application/json\r\n"
    return lines.encode("utf-8", "surrogateescape") + kind + head + b"\r\n" + content


def exchange(
    port: int, pieces: list[bytes], *, pause: float = 0.0, half_close: bool = False, patience: float = 30.0
) -> bytes:
    """Send the pieces and read until the server closes; TimeoutError when it never does."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as connection:
        # a server that has had enough closes while we still write
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
        if half_close:
            # not connected any more: the server was faster
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(65536):
                received += data
    return received


def statuses(received: bytes) -> list[int]:
    """Of all answers in what a connection gave."""
    return [int(line.split()[1]) for line in received.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
