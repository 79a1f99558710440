"""One request at a time by onnxruntime-genai: for GPUs, and for graphs that cannot be run by rows."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from qwen_onnx.errors import OverloadedError, QwenOnnxError, RequestError, ServiceError
from qwen_onnx.runtime.engines import QUEUE_SIZE
from qwen_onnx.runtime.engines.adapters import AdapterSource, Loaded
from qwen_onnx.runtime.engines.genai import Engine
from qwen_onnx.runtime.engines.interface import (
    CLOSED,
    EngineStats,
    Listener,
    TokenEvent,
    TokenRequest,
)
from qwen_onnx.runtime.engines.media import Picture, places_of
from qwen_onnx.runtime.engines.sampling import ALL_FEATURES, GENAI_FEATURES, GREEDY

log = logging.getLogger(__name__)
# genai keeps seeds in 32 bits
MOST_SEED = 2**31 - 1
NO_ADAPTERS = "this model's engine takes no adapters"


@dataclass(eq=False)
class Turn:
    """A request that waits or runs."""

    request: TokenRequest
    listener: Listener
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """See ``requests.Handle``."""
        self.cancelled.set()


class SerialEngine:
    """See ``requests.TokenEngine``. Args and errors are those of ``Engine``."""

    features = GENAI_FEATURES

    def __init__(self, folder: Path, *, queue_size: int = QUEUE_SIZE, threads: int | None = None) -> None:
        self._engine = Engine(folder, threads=threads)
        self.shape = self._engine.shape
        self._queue_size = queue_size
        self._turns: deque[Turn] = deque()
        self._changed = threading.Condition()
        self._running, self._closing = 0, False
        self._read, self._written = 0, 0
        # called by the owner thread after each event
        self.after_step: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="qwen-onnx engine", daemon=True)
        self._thread.start()

    @property
    def adapters(self) -> tuple[Loaded, ...]:
        """None."""
        return ()

    def load_adapter(self, source: AdapterSource) -> None:
        """See ``requests.TokenEngine``."""
        raise RequestError(NO_ADAPTERS, where="name")

    def unload_adapter(self, name: str) -> None:
        """See ``requests.TokenEngine``."""
        raise RequestError(NO_ADAPTERS, where="name")

    def submit(self, request: TokenRequest, listener: Listener) -> Turn:
        """See ``requests.TokenEngine``."""
        request.check(self.shape)
        _check_features(request)
        if request.adapter is not None:
            raise RequestError(NO_ADAPTERS, where="model")
        places_of(request.prompt_ids, request.media, self._engine.image_token)
        if any(isinstance(medium, Picture) and medium.joined for medium in request.media):
            # genai counts positions itself, and those in time as of pictures
            raise RequestError("this model's engine takes no videos", where="messages", hint="send pictures")
        turn = Turn(request, listener)
        with self._changed:
            if self._closing:
                raise ServiceError(CLOSED)
            if len(self._turns) + self._running > self._queue_size:
                raise OverloadedError(f"{len(self._turns)} requests wait already", hint="try again later")
            self._turns.append(turn)
            self._changed.notify()
        return turn

    def stats(self) -> EngineStats:
        """See ``requests.TokenEngine``."""
        return EngineStats(
            kind="serial",
            streams=1,
            running=self._running,
            waiting=len(self._turns),
            queue_size=self._queue_size,
            kv_tokens=0,
            kv_capacity=self.shape.context_length,
            prompt_tokens=self._read,
            cached_tokens=0,
            generated_tokens=self._written,
            restarts=0,
            resident_bytes=psutil.Process().memory_info().rss,
            alive=self._thread.is_alive(),
            failed=not self._thread.is_alive(),
        )

    def close(self) -> None:
        """Cancel what runs and free the model."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._engine.close()

    def _run(self) -> None:
        while turn := self._next():
            event = self._answered(turn)
            with self._changed:
                self._running = 0
            turn.listener(event)
            self.after_step()
        for turn in self._turns:
            turn.listener(TokenEvent(error=ServiceError(CLOSED)))
        self.after_step()

    def _next(self) -> Turn | None:
        with self._changed:
            while not (self._closing or self._turns):
                self._changed.wait()
            if self._closing:
                return None
            self._running = 1
            return self._turns.popleft()

    def _answered(self, turn: Turn) -> TokenEvent:
        """Run one request; returns its end."""
        request = turn.request
        count = 0

        def stopped() -> bool:
            return turn.cancelled.is_set() or self._closing

        try:
            self._read += len(request.prompt_ids)
            for token in self._engine.generate(
                request.prompt_ids,
                max_new_tokens=request.max_new_tokens,
                options=request.sampling,
                stop_on_eos=request.stop_on_eos,
                cancelled=stopped,
                media=request.media,
            ):
                count += 1
                self._written += 1
                turn.listener(TokenEvent(token))
                self.after_step()
        except QwenOnnxError as error:
            return TokenEvent(error=error)
        # genai raises RuntimeError and what derives from it
        except RuntimeError as error:
            log.exception("onnxruntime-genai failed")
            return TokenEvent(error=ServiceError(f"the engine failed: {type(error).__name__}"))
        if turn.cancelled.is_set():
            return TokenEvent(finish="cancelled")
        if self._closing:
            return TokenEvent(error=ServiceError(CLOSED))
        return TokenEvent(finish="length" if count == request.max_new_tokens else "stop")


def _check_features(request: TokenRequest) -> None:
    asked = {name for name in ALL_FEATURES if getattr(request.sampling, name, None) != getattr(GREEDY, name, None)}
    asked |= {name for name in ("logprobs", "grammar") if getattr(request, name) is not None}
    asked |= {"echo"} if request.echo else set()
    for name in sorted(asked - SerialEngine.features):
        raise RequestError(f"{name} is not supported for this model on this device", where=name)
    if (request.sampling.seed or 0) > MOST_SEED:
        raise RequestError(f"seed is {request.sampling.seed}, the most is {MOST_SEED} on this device", where="seed")
