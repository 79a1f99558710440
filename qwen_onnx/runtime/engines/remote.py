"""An engine in a process of its own: the event loop of this one stays free, and a crash there is no crash here."""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_onnx.errors import OverloadedError, QwenOnnxError, WorkerDiedError
from qwen_onnx.runtime.engines.adapters import AdapterSource, Loaded
from qwen_onnx.runtime.engines.child import Child, Patience
from qwen_onnx.runtime.engines.genai import Shape
from qwen_onnx.runtime.engines.host import LOAD, UNLOAD, Changed
from qwen_onnx.runtime.engines.interface import EngineStats, Listener, TokenEvent, TokenRequest
from qwen_onnx.runtime.engines.loading import EngineOptions

log = logging.getLogger(__name__)


@dataclass(eq=False)
class RemoteHandle:
    """A request in the child."""

    number: int
    child: Child

    def cancel(self) -> None:
        """See ``interface.Handle``."""
        self.child.send("cancel", self.number)


class RemoteEngine:
    """An engine in a child process; see ``interface.TokenEngine``.

    Should the child die or fall silent, another is started; after ``Patience.most_deaths`` in a row none is, which
    ``stats().failed`` tells.

    Raises:
        ArtifactError: the child cannot load the model, or dies while it does.
    """

    def __init__(self, folder: Path, options: EngineOptions | None = None, *, patience: Patience | None = None) -> None:
        self._folder, self._options, self._patience = folder, options or EngineOptions(), patience or Patience()
        self._lock = threading.Lock()
        self._listeners: dict[int, Listener] = {}
        # of those who wait for a change of the adapters, with what is to be loaded
        self._waiting: dict[int, tuple[queue.SimpleQueue[QwenOnnxError | None], AdapterSource | None]] = {}
        self._number, self._restarts, self._deaths = 0, 0, 0
        self._closing = threading.Event()
        self._failed = False
        self._child = self._start()
        self.shape: Shape = self._child.shape
        self.features: frozenset[str] = self._child.features
        self.seal = self._child.seal
        if self.seal:
            # whatever lies there when another process is started: it must be the same
            self._options = replace(self._options, expect=self.seal.digest)
        self._alive = True
        self._reader = threading.Thread(target=self._read, name="qwen-onnx worker", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int | None:
        """Of the child."""
        return self._child.pid

    def _start(self) -> Child:
        return Child(self._folder, self._options, self._patience, self._closing.is_set)

    def submit(self, request: TokenRequest, listener: Listener) -> RemoteHandle:
        """See ``interface.TokenEngine``."""
        request.check(self.shape)
        with self._lock:
            self._check_life()
            waiting = len(self._listeners) - self._child.stats.streams
            if waiting >= self._options.queue_size:
                raise OverloadedError(f"{waiting} requests wait already", hint="try again later")
            self._number += 1
            number, child = self._number, self._child
            self._listeners[number] = listener
        child.send("submit", number, request)
        return RemoteHandle(number, child)

    @property
    def adapters(self) -> tuple[Loaded, ...]:
        """See ``interface.TokenEngine``."""
        with self._lock:
            return self._child.adapters

    def load_adapter(self, source: AdapterSource) -> None:
        """See ``interface.TokenEngine``; WorkerDiedError when the process dies meanwhile."""
        self._change(LOAD, source, source)

    def unload_adapter(self, name: str) -> None:
        """See ``interface.TokenEngine``; WorkerDiedError when the process dies meanwhile."""
        self._change(UNLOAD, name, None)

    def _change(self, kind: str, content: AdapterSource | str, source: AdapterSource | None) -> None:
        answer: queue.SimpleQueue[QwenOnnxError | None] = queue.SimpleQueue()
        with self._lock:
            self._check_life()
            self._number += 1
            number, child = self._number, self._child
            self._waiting[number] = answer, source
        child.send(kind, number, content)
        error = answer.get()
        if error is not None:
            raise error

    def _heard(self, child: Child, change: Changed) -> None:
        """Note what the child holds, so that the next one will hold it too."""
        error = change.outcome if isinstance(change.outcome, QwenOnnxError) else None
        with self._lock:
            answer, source = self._waiting.pop(change.number)
            swapping = self._options.swapping
            if not isinstance(change.outcome, QwenOnnxError) and swapping:
                child.adapters = change.outcome
                held = {each.name for each in change.outcome if not each.fixed}
                sources = {each.name: each for each in (*swapping.sources, *([source] if source else []))}
                kept = tuple(each for name, each in sources.items() if name in held)
                self._options = replace(self._options, swapping=replace(swapping, sources=kept))
        answer.put(error)

    def _check_life(self) -> None:
        if self._failed:
            raise WorkerDiedError(
                "the engine's process died again and again; it is not started any more",
                hint="restart the server; its log says why the process died",
                retry_after=60,
            )
        if not self._alive:
            raise WorkerDiedError("the engine's process died; it is started again", retry_after=5)
        if self._child.late:
            raise WorkerDiedError("the engine's process does not answer; it is replaced if it stays so", retry_after=5)

    def stats(self) -> EngineStats:
        """See ``interface.TokenEngine``; memory and tokens are at most ``host.STATS_EVERY`` seconds old."""
        with self._lock:
            count, last = len(self._listeners), self._child.stats
            running = min(count, last.streams)
            return replace(
                last,
                running=running,
                waiting=count - running,
                restarts=self._restarts,
                alive=self._alive and not self._child.late,
                failed=self._failed,
            )

    def _read(self) -> None:
        """What the child says, for as long as there is one."""
        while not self._closing.is_set():
            reason = self._listen()
            if self._closing.is_set():
                self._tell_all(WorkerDiedError("the engine's process was ended", retry_after=5))
            elif not self._revive(reason):
                return

    def _listen(self) -> str:
        """Pass on what the child tells until it is gone; returns how that came."""
        child = self._child
        try:
            while True:
                message = child.receive()
                if isinstance(message, EngineStats):
                    child.stats = message
                elif isinstance(message, Changed):
                    self._heard(child, message)
                elif message is not None:
                    for number, event in message:
                        self._tell(number, event)
                elif child.hung:
                    child.kill()
                    return f"no word for {self._patience.hung:g} s: killed"
        except (EOFError, OSError):
            return child.ending()
        # whatever a message does to us, those who wait must hear that no answer comes
        except Exception as error:
            log.exception("the engine's messages cannot be read")
            child.kill()
            return f"its messages cannot be read: {type(error).__name__}"

    def _tell(self, number: int, event: TokenEvent) -> None:
        with self._lock:
            listener = self._listeners.get(number)
            if event.last:
                self._listeners.pop(number, None)
        if listener:
            listener(event)

    def _revive(self, reason: str) -> bool:
        """Tell everybody that the child died and start another; false when there is no hope or no need."""
        self._lose(reason)
        lived = time.monotonic() - self._child.started
        self._deaths = 1 if lived >= self._patience.life else self._deaths + 1
        self._child.end(0)
        while self._deaths < self._patience.most_deaths:
            if self._closing.wait(self._patience.pause(self._deaths)):
                return False
            try:
                child = self._start()
            except QwenOnnxError as error:
                self._deaths += 1
                log.error("it cannot be started again: %s", error.what)
                continue
            with self._lock:
                self._child, self._alive = child, True
                self._restarts += 1
            log.warning("the engine's process was started again")
            return True
        with self._lock:
            self._failed = True
        log.error("it died %d times, each soon after its start: it is not started again", self._deaths)
        return False

    def _lose(self, reason: str) -> None:
        """Tell everybody that their answers will not come."""
        with self._lock:
            self._alive = False
            count = len(self._listeners)
        log.error("the engine's process died (%s); %d requests are lost", reason, count)
        self._tell_all(WorkerDiedError(f"the engine's process died ({reason})", retry_after=5))

    def _tell_all(self, error: WorkerDiedError) -> None:
        for number in list(self._listeners):
            self._tell(number, TokenEvent(error=error))
        with self._lock:
            waiting = list(self._waiting.values())
            self._waiting.clear()
        for answer, _ in waiting:
            answer.put(error)

    def close(self) -> None:
        """End the child process; what still runs hears of it."""
        self._closing.set()
        self._child.stop(10)
        self._reader.join(timeout=60)
        # another one, when the first was just being replaced
        self._child.end(10)
