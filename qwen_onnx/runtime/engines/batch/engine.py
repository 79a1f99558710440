"""The engine's owner thread: takes requests in between two steps, and gives every step to all of them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import psutil

from qwen_onnx.artifact.kv_scales import read_kv_scales
from qwen_onnx.errors import OverloadedError, QwenOnnxError, RequestError, ServiceError
from qwen_onnx.runtime.engines import QUEUE_SIZE, STREAMS, KvCache, Speculate
from qwen_onnx.runtime.engines.adapters import AdapterSource, Loaded, Swapping
from qwen_onnx.runtime.engines.batch.guidance import Grammars
from qwen_onnx.runtime.engines.batch.model import BatchModel, Floats
from qwen_onnx.runtime.engines.batch.rows import Rows
from qwen_onnx.runtime.engines.batch.sampling import Sampler
from qwen_onnx.runtime.engines.batch.sight import Looked
from qwen_onnx.runtime.engines.batch.speculation import Costs, Speculator
from qwen_onnx.runtime.engines.batch.stream import Stream
from qwen_onnx.runtime.engines.genai import Shape
from qwen_onnx.runtime.engines.interface import (
    CLOSED,
    EngineFinish,
    EngineStats,
    Listener,
    TokenEvent,
    TokenRequest,
    Top,
)
from qwen_onnx.runtime.engines.media import Positions
from qwen_onnx.runtime.engines.sampling import BATCH_FEATURES

log = logging.getLogger(__name__)
# more at once would hold up the others for longer, fewer read the prompt more slowly (docs/lab-log.md)
PREFILL_CHUNK = 64


class BatchEngine:
    """Continuous batching; see ``requests.TokenEngine``.

    Args:
        folder: flat folder of an exported model.
        streams: requests at once; more wait.
        queue_size: how many may wait.
        capacity: tokens of a stream, prompt and answer; None: the context, or what the memory allows.
        threads: threads of onnxruntime; None leaves it to onnxruntime.
        speculate: ``ngram`` computes several tokens a step where a text repeats itself, see ``speculation``.
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
        speculate: Speculate = "ngram",
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
        )
        self.features = BATCH_FEATURES if self._model.tells_every_position else BATCH_FEATURES - {"echo"}
        self.shape = replace(Shape.read(folder), context_length=self._model.capacity)
        self._grammars = Grammars(folder, self.shape)
        self._rows, self._queue_size = Rows(streams), queue_size
        self._waiting: deque[Stream] = deque()
        self._active: list[Stream] = []
        self._changed = threading.Condition()
        self._closing, self._failed = False, False
        self._counted = dict.fromkeys(
            ("prompt_tokens", "cached_tokens", "generated_tokens", "drafted_tokens", "accepted_tokens"), 0
        )
        # a graph that tells the last position alone cannot tell which guesses are right
        self._speculates = speculate == "ngram" and self._model.tells_every_position
        self._costs, self._clock = Costs(), 0
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
        with self._changed:
            if self._closing or self._failed:
                raise ServiceError(CLOSED)
            waiting = len(self._waiting) + len(self._active) - len(self._rows.histories)
            if waiting >= self._queue_size:
                raise OverloadedError(f"{waiting} requests wait already", hint="try again later")
            stream.scope = self._scope(request)
            self._waiting.append(stream)
            self._changed.notify()
        return stream

    def _scope(self, request: TokenRequest) -> str:
        """Keys and values are those of an adapter, too; its digest, since another may get its name."""
        if request.adapter is None:
            return request.cache_scope
        return f"{request.cache_scope}:{self._model.adapters.used(request.adapter).digest}"

    @property
    def adapters(self) -> tuple[Loaded, ...]:
        """See ``requests.TokenEngine``."""
        with self._changed:
            return self._model.adapters.told()

    def load_adapter(self, source: AdapterSource) -> None:
        """See ``requests.TokenEngine``."""
        adapter = self._model.adapters.read(source)
        with self._changed:
            self._model.put_adapter(source.name, adapter, self._busy())

    def unload_adapter(self, name: str) -> None:
        """See ``requests.TokenEngine``."""
        with self._changed:
            self._model.drop_adapter(name, self._busy())

    def _busy(self) -> set[str | None]:
        return {stream.request.adapter for stream in (*self._active, *self._waiting)}

    def _speculator(self, request: TokenRequest) -> Speculator | None:
        """How wide a step is shows in how it is rounded, so that times must not decide on the steps of a seed."""
        if not self._speculates:
            return None
        costs = self._costs if request.sampling.seed is None else Costs()
        return Speculator(request.prompt_ids, costs, self._model.sense.token if self._model.sense else None)

    def stats(self) -> EngineStats:
        """See ``requests.TokenEngine``."""
        return EngineStats(
            kind="batch",
            streams=len(self._rows.histories),
            running=len(self._active),
            waiting=len(self._waiting),
            queue_size=self._queue_size,
            kv_tokens=sum(map(len, self._rows.histories)),
            kv_capacity=len(self._rows.histories) * self._model.capacity,
            kv_token_bytes=self._model.kv_bytes_per_token,
            restarts=0,
            resident_bytes=psutil.Process().memory_info().rss,
            alive=not self._failed,
            failed=self._failed,
            **self._counted,
        )

    def close(self) -> None:
        """Cancel what runs and free the model."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._next_step_is_due():
                self._step()
                self.after_step()
        # whatever it is, those who wait must hear of it; the owner of this engine starts another
        except Exception as error:
            log.exception("the engine failed")
            self._failed = True
            self._end_all(TokenEvent(error=ServiceError(f"the engine failed: {type(error).__name__}")))
        else:
            self._end_all(TokenEvent(error=ServiceError(CLOSED)))

    def _next_step_is_due(self) -> bool:
        with self._changed:
            while not (self._closing or self._active or self._waiting):
                self._changed.wait()
            return not self._closing

    def _end_all(self, event: TokenEvent) -> None:
        with self._changed:
            streams = [*self._active, *self._waiting]
            self._active.clear()
            self._waiting.clear()
        for stream in streams:
            stream.listener(event)
        self.after_step()

    def _step(self) -> None:
        """One piece of one prompt, and one token of every answer, or some of an answer that repeats what stands."""
        for stream in [stream for stream in self._active if stream.cancelled.is_set()]:
            self._finish(stream, "cancelled")
        self._admit()
        unread = [stream for stream in self._active if stream.token is None]
        if unread:
            # in turns, so that a short prompt does not wait behind a long one
            self._prefill(min(unread, key=lambda stream: stream.served))
        decoding = [stream for stream in self._active if stream.token is not None]
        groups: dict[Stream | str | None, list[Stream]] = {}
        for stream in decoding:
            groups.setdefault(stream if stream.seeded else stream.request.adapter, []).append(stream)
        alone = len(self._active) == 1
        for group in groups.values():
            first = group[0]
            if first.seeded:
                first.rest = 0 if alone else first.rest
                if first.rest >= 1:
                    first.rest -= 1
                    continue
            if not ((alone or first.seeded) and self._verify(first)):
                self._decode(group)

    def _admit(self) -> None:
        while self._waiting:
            stream = self._waiting[0]
            if stream.cancelled.is_set():
                with self._changed:
                    self._waiting.popleft()
                stream.listener(TokenEvent(finish="cancelled"))
                continue
            row = self._rows.admit(stream.looked.keys, stream.scope, reuse=not stream.fresh)
            if row is None:
                return
            stream.row = row
            self._found(stream, len(self._rows.histories[row]))
            with self._changed:
                self._active.append(self._waiting.popleft())

    def _found(self, stream: Stream, filled: int) -> None:
        """Count what needs no computing."""
        self._counted["cached_tokens"] += filled - stream.filled
        stream.cached += filled - stream.filled
        stream.filled = filled

    def _prefill(self, stream: Stream) -> None:
        prompt, keys, history = stream.request.prompt_ids, stream.looked.keys, self._rows.histories[stream.row]
        source, common = (stream.row, 0) if stream.fresh else self._rows.longest(keys, stream.row)
        if common:
            self._model.copy(source, stream.row, common)
            history[:] = keys[:common]
            self._found(stream, common)
        begin, end = stream.filled, min(stream.filled + PREFILL_CHUNK, len(prompt))
        piece, looked = np.array(prompt[begin:end], np.int64), stream.looked
        positions, features = looked.positions(begin, end), looked.features(begin, end)
        told: tuple[tuple[float, Top], ...] = ()
        adapter = stream.request.adapter
        if stream.request.scored:
            every = self._model.every_position(
                stream.row, piece, begin, positions=positions, features=features, adapter=adapter
            )
            # nothing of the prompt follows its last token
            following = prompt[begin + 1 : end + 1]
            told = tuple(stream.sampler.likely(*pair) for pair in zip(every, following, strict=False))
            logits = every[-1]
        else:
            logits = self._model.extend(
                stream.row, piece[None], [begin], positions=positions, features=features, adapter=adapter
            )[0]
        history += keys[begin:end]
        stream.filled += len(piece)
        self._clock += 1
        stream.served = self._clock
        self._counted["prompt_tokens"] += len(piece)
        if told:
            stream.listener(TokenEvent(prompt=told, cached_tokens=stream.cached))
        if stream.filled == len(prompt):
            self._finish(stream, "length") if stream.request.max_new_tokens == 0 else self._draw(stream, logits)

    def _decode(self, streams: list[Stream]) -> None:
        """One token for each, with one adapter; rows between them are computed for nothing, behind what they hold."""
        histories = self._rows.histories
        first, last = min(stream.row for stream in streams), max(stream.row for stream in streams)
        tokens = np.zeros((last - first + 1, 1), np.int64)
        past = [min(len(history), self._model.capacity - 1) for history in histories[first : last + 1]]
        for stream in streams:
            tokens[stream.row - first] = cast("int", stream.token)
        for row in range(first, last + 1):
            del histories[row][past[row - first] :]
        positions, adapter = self._positions(streams, first, past), streams[0].request.adapter
        begin = time.perf_counter()
        logits = self._model.extend(first, tokens, past, positions=positions, adapter=adapter)
        if len(self._active) == 1:
            self._costs.note(1, time.perf_counter() - begin)
        for stream in streams:
            histories[stream.row].append(int(tokens[stream.row - first, 0]))
            self._rows.touch(stream.row)
        for stream, row in [(stream, stream.row) for stream in streams]:
            self._draw(stream, logits[row - first])

    def _verify(self, stream: Stream) -> bool:
        """A step with guessed tokens behind the one that waits; false when none is worth it, and nothing was done.

        Each token is drawn as it would be without: the first that differs from the guess is the last of the step. What
        the row holds of wrong guesses stands behind its history and is written over. GroupQueryAttention takes
        several tokens of one row alone, so that the step is not shared.
        """
        most = stream.request.max_new_tokens - stream.drawn - 1
        guess = stream.speculator.propose(most) if stream.speculator else []
        if not guess or not stream.speculator:
            return False
        history, row = self._rows.histories[stream.row], stream.row
        tokens = [cast("int", stream.token), *guess]
        positions, ids = self._positions([stream], row, [len(history)], len(tokens)), np.array(tokens, np.int64)
        adapter, begin = stream.request.adapter, time.perf_counter()
        logits = self._model.every_position(row, ids, len(history), positions=positions, adapter=adapter)
        if len(self._active) == 1:
            self._costs.note(len(tokens), time.perf_counter() - begin)
        self._rows.touch(row)
        right = self._drawn(stream, history, tokens, logits)
        stream.rest += stream.speculator.settle(len(guess), right) - 1
        self._counted["drafted_tokens"] += len(guess)
        self._counted["accepted_tokens"] += right
        return True

    def _drawn(self, stream: Stream, history: list[int], tokens: list[int], logits: Floats) -> int:
        """Draw what follows each of ``tokens``, as long as it is the next of them; returns how often it was."""
        for index, token in enumerate(tokens):
            history.append(token)
            goes_on = self._draw(stream, logits[index])
            if not goes_on or stream.token not in tokens[index + 1 : index + 2]:
                return index
        return len(tokens) - 1

    def _positions(self, streams: list[Stream], first: int, past: list[int], width: int = 1) -> Positions | None:
        """Of ``width`` tokens in each row, int64 [3, rows, width]; None when no prompt had a picture."""
        if not any(stream.looked.moved for stream in streams):
            return None
        found = np.array(past, np.int64)
        for stream in streams:
            found[stream.row - first] += stream.looked.moved
        return np.broadcast_to(found[:, None] + np.arange(width), (3, len(past), width))

    def _draw(self, stream: Stream, logits: Floats) -> bool:
        """The next token of an answer; whether it goes on."""
        try:
            token, logprob, top = stream.sampler.draw(logits)
        except QwenOnnxError as error:
            self._release(stream)
            stream.listener(TokenEvent(error=error))
            return False
        if stream.request.stop_on_eos and token in self.shape.eos_token_ids:
            self._finish(stream, "stop", (token, logprob, top) if stream.request.scored else (None, None, ()))
            return False
        stream.token = token
        stream.drawn += 1
        if stream.speculator:
            stream.speculator.hear(token)
        self._counted["generated_tokens"] += 1
        stream.listener(TokenEvent(token, logprob, top, cached_tokens=stream.cached))
        if stream.sampler.finished:
            self._finish(stream, "stop")
            return False
        if stream.drawn == stream.request.max_new_tokens:
            self._finish(stream, "length")
            return False
        return True

    def _finish(
        self, stream: Stream, reason: EngineFinish, eos: tuple[int | None, float | None, Top] = (None, None, ())
    ) -> None:
        self._release(stream)
        stream.listener(TokenEvent(*eos, finish=reason, cached_tokens=stream.cached))

    def _release(self, stream: Stream) -> None:
        """Free the row; a stream at an end of the batch moves into the gap."""
        with self._changed:
            self._active.remove(stream)
        end = self._rows.release(stream.row)
        if end is None:
            return
        moved = next(other for other in self._active if other.row == end)
        self._model.copy(end, stream.row, len(self._rows.histories[end]))
        self._rows.move(end, stream.row)
        moved.row = stream.row
