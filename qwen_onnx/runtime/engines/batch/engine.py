"""The engine's owner thread: takes requests in between two steps, and gives every step to all of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil

from qwen_onnx.artifact.kv_scales import read_kv_scales
from qwen_onnx.errors import OverloadedError, RequestError, ServiceError
from qwen_onnx.runtime.engines import QUEUE_SIZE, STREAMS, KvCache, Speculate
from qwen_onnx.runtime.engines.adapters import AdapterSource, Loaded, Swapping
from qwen_onnx.runtime.engines.batch.draft_head import Ahead
from qwen_onnx.runtime.engines.batch.guidance import Grammars
from qwen_onnx.runtime.engines.batch.model import BatchModel
from qwen_onnx.runtime.engines.batch.sampling import Sampler
from qwen_onnx.runtime.engines.batch.sight import Looked
from qwen_onnx.runtime.engines.batch.speculation import Costs, Speculator
from qwen_onnx.runtime.engines.batch.steps import PREFILL_CHUNK, Steps
from qwen_onnx.runtime.engines.batch.stream import Stream
from qwen_onnx.runtime.engines.genai import Shape
from qwen_onnx.runtime.engines.interface import (
    CLOSED,
    EngineStats,
    Listener,
    TokenEvent,
    TokenRequest,
)
from qwen_onnx.runtime.engines.sampling import BATCH_FEATURES

log = logging.getLogger(__name__)


class BatchEngine:
    """Continuous batching; see ``requests.TokenEngine``.

    Args:
        folder: flat folder of an exported model.
        streams: requests at once; more wait.
        queue_size: how many may wait.
        capacity: tokens of a stream, prompt and answer; None: the context, or what the memory allows.
        threads: threads of onnxruntime; None leaves it to onnxruntime.
        speculate: ``ngram`` computes several tokens a step where a text repeats itself, ``auto`` also those that the
            model's head for multi-token prediction guesses, if it has one; see ``speculation``.
        adapters: that requests may name; swapping: others may be loaded and unloaded.
        kv_cache: ``int8`` keeps keys and values in a quarter of the memory, by the scales in the folder.

    Raises:
        UnsupportedGraphError, ArtifactError, EnvironmentFault: see ``BatchModel`` and ``read_kv_scales``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        streams: int = STREAMS,
        queue_size: int = QUEUE_SIZE,
        capacity: int | None = None,
        threads: int | None = None,
        speculate: Speculate = "auto",
        adapters: Sequence[AdapterSource] = (),
        swapping: Swapping | None = None,
        kv_cache: KvCache = "float",
    ) -> None:
        self._model = BatchModel(
            folder,
            rows=streams,
            capacity=capacity,
            chunk=PREFILL_CHUNK,
            threads=threads,
            adapters=adapters,
            swapping=swapping,
            kv_scales=partial(read_kv_scales, folder) if kv_cache == "int8" else None,
            drafts=speculate == "auto",
        )
        self.features = BATCH_FEATURES if self._model.tells_every_position else BATCH_FEATURES - {"echo"}
        self.shape = replace(Shape.read(folder), context_length=self._model.capacity)
        self._grammars = Grammars(folder, self.shape)
        self._steps, self._queue_size = Steps(self._model, streams, self.shape.eos_token_ids), queue_size
        self._closing, self._failed = False, False
        # a graph that tells the last position alone cannot tell which guesses are right
        self._speculates = speculate != "off" and self._model.tells_every_position
        # called by the owner thread when all events of a step are told
        self.after_step: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="qwen-onnx engine", daemon=True)
        self._thread.start()

    def submit(self, request: TokenRequest, listener: Listener) -> Stream:
        """See ``requests.TokenEngine``."""
        request.check(self.shape)
        if request.echo and "echo" not in self.features:
            raise RequestError("echo is not supported for this model: its graph tells the last position", where="echo")
        looked = Looked(request, self._model.sense)
        matcher = self._grammars.matcher(request.grammar) if request.grammar is not None else None
        forbidden = () if request.stop_on_eos else tuple(self.shape.eos_token_ids)
        if self._model.sense is not None:
            # in an answer it would stand for a medium that nobody sent, and the embedding fails for want of it
            forbidden += self._model.sense.unspoken
        stream = Stream(request, listener, Sampler(request, matcher, forbidden), looked, self._speculator(request))
        with self._steps.changed:
            if self._closing or self._failed:
                raise ServiceError(CLOSED)
            waiting = len(self._steps.waiting) + len(self._steps.active) - len(self._steps.rows.histories)
            if waiting >= self._queue_size:
                raise OverloadedError(f"{waiting} requests wait already", hint="try again later")
            stream.scope = self._scope(request)
            self._steps.waiting.append(stream)
            self._steps.changed.notify()
        return stream

    def _scope(self, request: TokenRequest) -> str:
        """Keys and values are those of an adapter, too; its digest, since another may get its name."""
        if request.adapter is None:
            return request.cache_scope
        return f"{request.cache_scope}:{self._model.adapters.used(request.adapter).digest}"

    @property
    def adapters(self) -> tuple[Loaded, ...]:
        """See ``requests.TokenEngine``."""
        with self._steps.changed:
            return self._model.adapters.told()

    def load_adapter(self, source: AdapterSource) -> None:
        """See ``requests.TokenEngine``."""
        adapter = self._model.adapters.read(source)
        with self._steps.changed:
            self._model.put_adapter(source.name, adapter, self._busy())

    def unload_adapter(self, name: str) -> None:
        """See ``requests.TokenEngine``."""
        with self._steps.changed:
            self._model.drop_adapter(name, self._busy())

    def _busy(self) -> set[str | None]:
        return {stream.request.adapter for stream in (*self._steps.active, *self._steps.waiting)}

    def _speculator(self, request: TokenRequest) -> Speculator | None:
        """How wide a step is shows in how it is rounded, so that times must not decide on the steps of a seed."""
        if not self._speculates:
            return None
        costs = self._steps.costs if request.sampling.seed is None else Costs()
        barred = self._model.sense.token if self._model.sense else None
        head, unread = self._model.draft_head, self._model.sense.unspoken if self._model.sense else ()
        ahead = Ahead(head, request.max_new_tokens, unread) if head else None
        return Speculator(request.prompt_ids, costs, barred, again=self._model.states is not None, ahead=ahead)

    def stats(self) -> EngineStats:
        """See ``requests.TokenEngine``."""
        return EngineStats(
            kind="batch",
            streams=len(self._steps.rows.histories),
            running=len(self._steps.active),
            waiting=len(self._steps.waiting),
            queue_size=self._queue_size,
            kv_tokens=sum(map(len, self._steps.rows.histories)),
            kv_capacity=len(self._steps.rows.histories) * self._model.capacity,
            kv_token_bytes=self._model.kv_bytes_per_token,
            restarts=0,
            resident_bytes=psutil.Process().memory_info().rss,
            alive=not self._failed,
            failed=self._failed,
            **self._steps.counted,
        )

    def close(self) -> None:
        """Cancel what runs and free the model."""
        with self._steps.changed:
            self._closing = True
            self._steps.changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._next_step_is_due():
                self._steps.step()
                self.after_step()
        # whatever it is, those who wait must hear of it; the owner of this engine starts another
        except Exception as error:
            log.exception("the engine failed")
            self._failed = True
            self._end_all(TokenEvent(error=ServiceError(f"the engine failed: {type(error).__name__}")))
        else:
            self._end_all(TokenEvent(error=ServiceError(CLOSED)))

    def _next_step_is_due(self) -> bool:
        with self._steps.changed:
            while not (self._closing or self._steps.active or self._steps.waiting):
                self._steps.changed.wait()
            return not self._closing

    def _end_all(self, event: TokenEvent) -> None:
        with self._steps.changed:
            streams = [*self._steps.active, *self._steps.waiting]
            self._steps.active.clear()
            self._steps.waiting.clear()
        for stream in streams:
            stream.listener(event)
        self.after_step()
