"""The server with a probe inside: how late its event loop is, told at /probe.

``python -m benchmarks.lag FOLDER --port 8000`` serves the same application as ``qwen-onnx serve``. It is for
the benchmark alone: a clock outside the process would measure the client's event loop as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.live import LOOPBACK
from qwen_onnx.errors import run

INTERVAL_S = 0.005
PATH = "/probe"

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


class LagProbe:
    """An ASGI application around another. GET /probe gives the lateness in ms since the last GET, and engine stats.

    A sleeper asks to be woken every ``INTERVAL_S`` seconds and notes how much later it is: what any callback waits
    for the event loop. The first GET starts it.
    """

    def __init__(self, app: App, stats: Callable[[], dict[str, Any]]) -> None:
        self._app, self._stats = app, stats
        self._late_ms: list[float] = []
        self._sleeper: asyncio.Task[None] | None = None

    async def _sleep(self) -> None:
        while True:
            due = time.perf_counter() + INTERVAL_S
            await asyncio.sleep(INTERVAL_S)
            self._late_ms.append((time.perf_counter() - due) * 1000)

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        """Answer /probe; leave the rest to the application."""
        if scope["type"] != "http" or scope["path"] != PATH:
            await self._app(scope, receive, send)
            return
        if self._sleeper is None:
            self._sleeper = asyncio.create_task(self._sleep())
        late, self._late_ms = self._late_ms, []
        body = json.dumps({"late_ms": late, "engine": self._stats()}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def main() -> int:
    """Serve with the probe until SIGTERM."""
    import uvicorn

    from qwen_onnx.runtime.server.app import create_app
    from qwen_onnx.runtime.service.qwen import QwenService

    parser = argparse.ArgumentParser(description="serve an artifact with a probe of the event loop")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    # the prompts of a load test repeat themselves: benchmarks/speculation.py measures what guessing makes of such
    service = QwenService(given.folder, threads=given.threads, isolated=True, speculate="off")

    def stats() -> dict[str, Any]:
        # the engine of one stream tells none
        told = getattr(service.engine, "stats", None)
        return asdict(told()) if told else {}

    app = LagProbe(create_app(service, given.folder.name), stats)
    uvicorn.run(app, host=LOOPBACK, port=given.port, log_level="warning")
    return 0


if __name__ == "__main__":
    run(main)
