"""uvicorn with what it lacks: a time limit for headers, an exit code of 0 after SIGTERM, and a word when it listens."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from qwen_onnx.runtime.server.settings import ServerSettings

# the model's files, pipes and what the libraries open; without them nothing could be accepted or logged
SPARE_FILES = 64


def _open_files() -> int:
    """How many files this process may have open at once."""
    try:
        import resource
    except ImportError:
        # Windows has no such limit
        return sys.maxsize
    most: int = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return most if most > 0 else sys.maxsize


class TimedProtocol(H11Protocol):
    """A connection that ends when headers take too long, from its first byte on or from the end of an answer.

    uvicorn has a limit for idle connections only, and drops it with the first byte of the next request.
    """

    header_seconds = 10.0
    most_connections = 4096

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time."""
        self._headers_due: asyncio.TimerHandle | None = None
        # whoever has a handler at the root would get lines with raw paths
        self.access_log = False
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            # before a byte of it is read
            transport.close()
            return
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        """Stop the time when the headers are complete."""
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the time."""
        self._forget()
        super().connection_lost(exc)

    def _watch_headers(self) -> None:
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._forget()
        elif self._headers_due is None:
            self._headers_due = self.loop.call_later(self.header_seconds, self._too_slow)

    def _forget(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _too_slow(self) -> None:
        self._headers_due = None
        # an answer may still be on its way, with the next request's headers half here
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server.

    Args:
        listening: told the port as soon as it is open.
        draining: told when a signal asks to end.
        doomed: asked ten times a second; true ends the server, because it can answer nothing any more.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        listening: Callable[[int], None],
        draining: Callable[[], None],
        doomed: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(config)
        self._listening, self._draining, self._doomed = listening, draining, doomed

    async def on_tick(self, counter: int) -> bool:
        """Whether to end."""
        return await super().on_tick(counter) or self._doomed()

    async def startup(self, sockets: Any = None) -> None:
        """Open the port."""
        await super().startup(sockets)
        if self.started:
            self._listening(int(self.servers[0].sockets[0].getsockname()[1]))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second signal ends what still runs."""
        self._draining()
        self.force_exit = self.should_exit
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn raises the signal again when all is done, which makes the exit code that of a crash."""
        # only the main thread may have handlers: a server in another one is ended by its owner
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kept = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)


def make_config(app: Any, settings: ServerSettings) -> uvicorn.Config:
    """h11 and asyncio by name: what else is installed must not change which limits hold."""

    class Protocol(TimedProtocol):
        header_seconds = settings.header_seconds
        most_connections = min(settings.max_connections, _open_files() - SPARE_FILES)

    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Protocol,
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=settings.grace_seconds,
    )
