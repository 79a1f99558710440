"""One process with an engine, as its parent sees it: start it, talk to it, notice that it is silent or gone."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_onnx.artifact.seal import Seal
from qwen_onnx.errors import ArtifactError, QwenOnnxError
from qwen_onnx.runtime.engines import host
from qwen_onnx.runtime.engines.adapters import Loaded
from qwen_onnx.runtime.engines.genai import Shape
from qwen_onnx.runtime.engines.interface import EngineStats
from qwen_onnx.runtime.engines.loading import EngineOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How much is borne from an engine's process before it is taken for hung, and before it is given up. Seconds.

    Args:
        late: of silence, after which the engine counts as not alive. genai keeps the GIL through a piece of a prompt,
            so that a sound engine may be silent for some seconds.
        hung: of silence, after which it is killed and another started.
        load: for loading the model.
        life: a process that dies sooner than this after its start counts as one more death in a row.
        most_deaths: that many in a row, and no other is started.
        most_pause: before another start; the first comes at once, the second after a second, then twice as long each.
    """

    late: float = 20.0
    hung: float = 120.0
    load: float = 1800.0
    life: float = 60.0
    most_deaths: int = 6
    most_pause: float = 30.0

    @property
    def glance(self) -> float:
        """Between two looks for a message."""
        return min(1.0, self.late / 4)

    def pause(self, deaths: int) -> float:
        """Before the next start, after ``deaths`` in a row."""
        return 0.0 if deaths < 2 else min(2.0 ** (deaths - 2), self.most_pause)


class Child:
    """A process that loads ``folder``. ``send`` never blocks: a thread of its own writes.

    Args:
        given_up: asked while the model loads; true ends the wait.

    Raises:
        ArtifactError: it cannot load the model, dies while it does, or takes longer than ``Patience.load``.
    """

    shape: Shape
    features: frozenset[str]
    stats: EngineStats
    seal: Seal | None
    # those that it holds now
    adapters: tuple[Loaded, ...]

    def __init__(
        self, folder: Path, options: EngineOptions, patience: Patience, given_up: Callable[[], bool] = lambda: False
    ) -> None:
        self._patience = patience
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=host.main, args=(theirs, folder, options), daemon=True)
        self._process.start()
        theirs.close()
        # glances without a message: counted, not timed, so that time during which this process was stopped is no fault
        self._quiet = 0
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="qwen-onnx writer", daemon=True)
        self._writer.start()
        try:
            self.shape, self.features, self.stats, self.seal, self.adapters = self._loaded(given_up)
        except QwenOnnxError:
            self.end(0)
            raise
        self.started = time.monotonic()

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self._process.pid

    @property
    def late(self) -> bool:
        """Whether it has been silent for longer than is normal."""
        return self._silence >= self._patience.late

    @property
    def hung(self) -> bool:
        """Whether it has been silent for so long that it must be killed."""
        return self._silence >= self._patience.hung

    @property
    def _silence(self) -> float:
        return self._quiet * self._patience.glance

    def _loaded(self, given_up: Callable[[], bool]) -> Any:
        try:
            answer = self.receive()
            while answer is None:
                if self._silence >= self._patience.load or given_up():
                    raise ArtifactError(
                        f"the engine's process has not loaded the model within {self._silence:.0f} s",
                        hint="qwen-onnx doctor",
                    )
                answer = self.receive()
        except (EOFError, OSError) as error:
            raise ArtifactError(
                f"the engine's process died while it loaded ({self.ending()})",
                hint="is there enough memory? qwen-onnx doctor",
            ) from error
        if isinstance(answer, QwenOnnxError):
            raise answer
        return answer

    def receive(self) -> Any:
        """The next message; None when none came for a glance. EOFError or OSError when the process is gone."""
        if not self._pipe.poll(self._patience.glance):
            self._quiet += 1
            return None
        message = self._pipe.recv()
        self._quiet = 0
        return message

    def send(self, kind: str, number: int, content: Any = None) -> None:
        """Queue a message, pickled here, so that what cannot be is the caller's fault and not the writer's."""
        self._outgoing.put(pickle.dumps((kind, number, content)))

    def _write(self) -> None:
        while (content := self._outgoing.get()) is not None:
            try:
                self._pipe.send_bytes(content)
            except OSError:
                # the reader sees the end of the pipe too, and tells everybody
                log.debug("nobody reads the pipe")

    def ending(self) -> str:
        """How it ended."""
        self._process.join(timeout=5)
        code = self._process.exitcode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """At once; a process that is stopped goes too."""
        self._process.kill()

    def stop(self, seconds: float) -> None:
        """Ask it to end, and kill it when it has not after ``seconds``. Idempotent."""
        if seconds and self._process.is_alive():
            self.send("close", 0)
            self._process.join(timeout=seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(timeout=5)

    def end(self, seconds: float) -> None:
        """``stop``, and free what it had here, which nobody may be reading from any more. Idempotent."""
        self.stop(seconds)
        self._outgoing.put(None)
        self._writer.join(timeout=5)
        self._pipe.close()
