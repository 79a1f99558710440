"""What runs in the engine's own process: see ``remote`` for the other side of the pipe."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from qwen_onnx.artifact.seal import Seal
from qwen_onnx.errors import QwenOnnxError
from qwen_onnx.runtime.engines.adapters import Loaded
from qwen_onnx.runtime.engines.batch.engine import BatchEngine
from qwen_onnx.runtime.engines.interface import EngineStats, TokenEvent, TokenRequest
from qwen_onnx.runtime.engines.loading import EngineOptions, load_verified
from qwen_onnx.runtime.engines.serial import SerialEngine

log = logging.getLogger(__name__)
# seconds between two signs of life
STATS_EVERY = 0.25
# an engine that has work and does no step for so many seconds, or takes so long to accept a request, is stuck;
# the longest honest step is a whole prompt on a device that genai drives
STUCK_AFTER = 600.0
EXIT_FAILED = 70
# messages that change the adapters
LOAD, UNLOAD = "load_adapter", "unload_adapter"


def main(pipe: Connection, folder: Path, options: EngineOptions) -> None:
    """Serve requests until the parent says so or is gone."""
    # Ctrl-C goes to the whole group; the parent decides when to end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        engine, seal = load_verified(folder, options)
    except QwenOnnxError as error:
        pipe.send(error)
        return
    Host(pipe, engine, seal).run()


@dataclass(frozen=True)
class Changed:
    """What became of a change of the adapters: all that are held now, or why there was none."""

    number: int
    outcome: tuple[Loaded, ...] | QwenOnnxError


class Host:
    """The child's side of the pipe: numbered requests come in, lists of (number, event) go out, one for each step."""

    def __init__(self, pipe: Connection, engine: BatchEngine | SerialEngine, seal: Seal | None) -> None:
        self._pipe, self._engine = pipe, engine
        self._lock = threading.Lock()
        self._handles: dict[int, Any] = {}
        self._told: list[tuple[int, TokenEvent]] = []
        self._ended = threading.Event()
        # when the engine last got on, and since when a message is being handled
        self._stepped, self._busy_since = time.monotonic(), float("inf")
        engine.after_step = self._flush
        pipe.send((engine.shape, engine.features, engine.stats(), seal, engine.adapters))

    def run(self) -> None:
        """Until the pipe ends or ``close`` comes."""
        threading.Thread(target=self._pulse, name="qwen-onnx pulse", daemon=True).start()
        ended = False
        while not ended:
            try:
                message = self._pipe.recv()
            except (EOFError, OSError):
                break
            self._busy_since = time.monotonic()
            ended = self._handle(*message)
            self._busy_since = float("inf")
        self._ended.set()
        self._engine.close()

    def _pulse(self) -> None:
        """Tell the parent every now and then that all is well, and end this process when it is not."""
        while not self._ended.wait(STATS_EVERY):
            stats = self._engine.stats()
            if not stats.alive:
                log.error("the engine failed: a new process replaces this one")
                os._exit(EXIT_FAILED)
            if self._stuck(stats):
                log.error("the engine has done nothing for %.0f s: a new process replaces this one", STUCK_AFTER)
                os._exit(EXIT_FAILED)
            self._send(stats)

    def _stuck(self, stats: EngineStats) -> bool:
        now = time.monotonic()
        if not stats.running + stats.waiting:
            self._stepped = now
        return now - min(self._stepped, self._busy_since) > STUCK_AFTER

    def _handle(self, kind: str, number: int, content: Any) -> bool:
        if kind == "submit":
            self._submit(number, content)
        elif kind == "cancel" and number in self._handles:
            self._handles[number].cancel()
        elif kind in (LOAD, UNLOAD):
            self._send(Changed(number, self._change(kind, content)))
        return kind == "close"

    def _change(self, kind: str, content: Any) -> tuple[Loaded, ...] | QwenOnnxError:
        try:
            self._engine.load_adapter(content) if kind == LOAD else self._engine.unload_adapter(content)
        except QwenOnnxError as error:
            return error
        return self._engine.adapters

    def _submit(self, number: int, request: TokenRequest) -> None:
        ended = False

        def listener(event: TokenEvent) -> None:
            nonlocal ended
            if event.last:
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
        self._stepped = time.monotonic()
        if self._told:
            self._send(self._told)
            self._told = []

    def _send(self, message: Any) -> None:
        with self._lock:
            try:
                self._pipe.send(message)
            except OSError:
                log.debug("the parent is gone")
