"""An engine in a process of its own: the event loop of this one stays free, and a crash there is no crash here."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from qwen_onnx.errors import ArtifactError, OverloadedError, QwenOnnxError, WorkerDiedError
from qwen_onnx.runtime.engines import QUEUE_SIZE, STREAMS
from qwen_onnx.runtime.engines.batch.engine import BatchEngine
from qwen_onnx.runtime.engines.batch.model import UnsupportedGraphError
from qwen_onnx.runtime.engines.genai import Shape
from qwen_onnx.runtime.engines.interface import EngineStats, Listener, TokenEvent, TokenRequest
from qwen_onnx.runtime.engines.serial import SerialEngine

log = logging.getLogger(__name__)
STATS_EVERY = 0.25
# a process that dies sooner than this after its start will not live the next time either
LEAST_LIFE = 5.0


@dataclass(frozen=True)
class EngineOptions:
    """How to load an artifact; the fields are those of ``BatchEngine``."""

    streams: int = STREAMS
    queue_size: int = QUEUE_SIZE
    capacity: int | None = None
    threads: int | None = None


def load_engine(folder: Path, options: EngineOptions) -> BatchEngine | SerialEngine:
    """The engine that suits the artifact: continuous batching where the graph allows it, else genai.

    Raises:
        ArtifactError: neither loads it.
    """
    try:
        return BatchEngine(folder, **asdict(options))
    except UnsupportedGraphError as error:
        log.warning("one request at a time: %s", error.what)
        return SerialEngine(folder, queue_size=options.queue_size, threads=options.threads)


@dataclass(eq=False)
class RemoteHandle:
    """A request in the child."""

    number: int
    send: Callable[[Any], None]

    def cancel(self) -> None:
        """See ``requests.Handle``."""
        self.send(("cancel", self.number, None))


class RemoteEngine:
    """An engine in a child process; see ``requests.TokenEngine``. Should the child die, another is started.

    Raises:
        ArtifactError: the child cannot load the model, or dies while it does.
    """

    def __init__(self, folder: Path, options: EngineOptions | None = None) -> None:
        self._folder, self._options = folder, options or EngineOptions()
        self._lock = threading.Lock()
        self._listeners: dict[int, Listener] = {}
        self._number, self._restarts = 0, 0
        self._closing, self._alive = False, False
        self._start()
        self._reader = threading.Thread(target=self._read, name="qwen-onnx worker", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int | None:
        """Of the child."""
        return self._child.pid

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._child = context.Process(target=_child_main, args=(theirs, self._folder, self._options), daemon=True)
        self._child.start()
        theirs.close()
        self._started = time.monotonic()
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ArtifactError(
                f"the engine's process died while it loaded ({self._ending()})",
                hint="is there enough memory? qwen-onnx doctor",
            ) from error
        if isinstance(answer, QwenOnnxError):
            raise answer
        self.shape: Shape
        self.features: frozenset[str]
        self._stats: EngineStats
        self.shape, self.features, self._stats = answer
        self._alive = True

    def _ending(self) -> str:
        self._child.join(timeout=5)
        code = self._child.exitcode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def submit(self, request: TokenRequest, listener: Listener) -> RemoteHandle:
        """See ``requests.TokenEngine``."""
        self.shape.check(request.prompt_ids, request.max_new_tokens)
        with self._lock:
            if not self._alive:
                raise WorkerDiedError("the engine's process died; it is started again", retry_after=5)
            waiting = len(self._listeners) - self._stats.streams
            if waiting >= self._options.queue_size:
                raise OverloadedError(f"{waiting} requests wait already", hint="try again later")
            self._number += 1
            number = self._number
            self._listeners[number] = listener
        self._send(("submit", number, request))
        return RemoteHandle(number, self._send)

    def _send(self, message: Any) -> None:
        with self._lock:
            try:
                self._pipe.send(message)
            except OSError:
                # the reader sees the end of the pipe too, and tells everybody
                log.debug("nobody reads the pipe")

    def stats(self) -> EngineStats:
        """See ``requests.TokenEngine``; memory and tokens are at most ``STATS_EVERY`` seconds old."""
        with self._lock:
            count = len(self._listeners)
            running = min(count, self._stats.streams)
            return replace(
                self._stats, running=running, waiting=count - running, restarts=self._restarts, alive=self._alive
            )

    def _read(self) -> None:
        try:
            self._listen()
        # a reader that ended in silence would leave everybody waiting
        except Exception as error:
            log.exception("the engine's messages cannot be read")
            self._lose(f"its messages cannot be read: {type(error).__name__}")
            self._child.kill()

    def _listen(self) -> None:
        while not self._closing:
            try:
                message = self._pipe.recv()
            except (EOFError, OSError):
                if self._closing or not self._revive():
                    return
                continue
            if isinstance(message, EngineStats):
                self._stats = message
            else:
                for number, event in message:
                    self._tell(number, event)

    def _tell(self, number: int, event: TokenEvent) -> None:
        with self._lock:
            listener = self._listeners.get(number)
            if event.token is None:
                self._listeners.pop(number, None)
        if listener:
            listener(event)

    def _revive(self) -> bool:
        """Tell everybody that the child died and start another; false when there is no hope."""
        with self._lock:
            self._alive = False
        self._lose(self._ending())
        if time.monotonic() - self._started < LEAST_LIFE and self._restarts:
            log.error("it died soon after its start: it is not started again")
            return False
        try:
            self._start()
        except QwenOnnxError as error:
            log.error("it cannot be started again: %s", error.what)
            return False
        self._restarts += 1
        log.warning("the engine's process was started again")
        return True

    def _lose(self, reason: str) -> None:
        """Tell everybody that their answers will not come."""
        with self._lock:
            self._alive = False
            numbers = list(self._listeners)
        log.error("the engine's process died (%s); %d requests are lost", reason, len(numbers))
        for number in numbers:
            self._tell(
                number, TokenEvent(error=WorkerDiedError(f"the engine's process died ({reason})", retry_after=5))
            )

    def close(self) -> None:
        """End the child process."""
        self._closing = True
        self._send(("close", 0, None))
        self._child.join(timeout=10)
        if self._child.is_alive():
            self._child.kill()
        self._reader.join(timeout=5)
        self._pipe.close()


def _child_main(pipe: Connection, folder: Path, options: EngineOptions) -> None:
    """Serve requests until the parent says so or is gone."""
    # Ctrl-C goes to the whole group; the parent decides when to end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        engine = load_engine(folder, options)
    except QwenOnnxError as error:
        pipe.send(error)
        return
    host = _Host(pipe, engine)
    host.run()


class _Host:
    """The child's side of the pipe: numbered requests come in, lists of (number, event) go out, one for each step."""

    def __init__(self, pipe: Connection, engine: BatchEngine | SerialEngine) -> None:
        self._pipe, self._engine = pipe, engine
        self._lock = threading.Lock()
        self._handles: dict[int, Any] = {}
        self._told: list[tuple[int, TokenEvent]] = []
        engine.after_step = self._flush
        pipe.send((engine.shape, engine.features, engine.stats()))

    def run(self) -> None:
        """Until the pipe ends or ``close`` comes."""
        ended = False
        while not ended:
            try:
                if self._pipe.poll(STATS_EVERY):
                    ended = self._handle(*self._pipe.recv())
                else:
                    self._say_stats()
            except (EOFError, OSError):
                ended = True
        self._engine.close()

    def _handle(self, kind: str, number: int, content: Any) -> bool:
        if kind == "submit":
            self._submit(number, content)
        elif kind == "cancel" and number in self._handles:
            self._handles[number].cancel()
        return kind == "close"

    def _submit(self, number: int, request: TokenRequest) -> None:
        ended = False

        def listener(event: TokenEvent) -> None:
            nonlocal ended
            if event.token is None:
                with self._lock:
                    ended = True
                    self._handles.pop(number, None)
            self._told.append((number, event))

        try:
            handle = self._engine.submit(request, listener)
        except QwenOnnxError as error:
            self._send([(number, TokenEvent(error=error))])
            return
        with self._lock:
            if not ended:
                self._handles[number] = handle

    def _flush(self) -> None:
        if self._told:
            self._send(self._told)
            self._told = []

    def _send(self, message: Any) -> None:
        with self._lock:
            try:
                self._pipe.send(message)
            except OSError:
                log.debug("the parent is gone")

    def _say_stats(self) -> None:
        stats = self._engine.stats()
        if not stats.alive:
            raise EOFError("the engine failed: a new process replaces this one")
        self._send(stats)
