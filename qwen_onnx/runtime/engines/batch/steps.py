"""One step after the other: pieces of prompts and tokens of answers, for all requests at once."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import cast

import numpy as np

from qwen_onnx.errors import QwenOnnxError
from qwen_onnx.runtime.engines.batch.layout import Floats
from qwen_onnx.runtime.engines.batch.model import BatchModel
from qwen_onnx.runtime.engines.batch.rows import LEAST_PREFIX, Rows
from qwen_onnx.runtime.engines.batch.speculation import Costs
from qwen_onnx.runtime.engines.batch.stream import Stream
from qwen_onnx.runtime.engines.interface import EngineFinish, TokenEvent, Top
from qwen_onnx.runtime.engines.media import Positions

# more at once would hold up the others for longer, fewer read the prompt more slowly (docs/lab-log.md)
PREFILL_CHUNK = 64
# tokens from a prompt's end where its states are copied: one that shares all but the last message goes on from a copy,
# after at most some four times as many tokens as that message has
DISTANCES = (1, 256, 1024)


class Steps:
    """What the engine's owner thread does with the model and its rows.

    Attributes:
        changed: whoever touches ``waiting`` or ``active``, or takes from them, holds it.
        counted: tokens, as ``EngineStats`` has them.
        costs: of the steps of all requests without a seed.

    Args:
        streams: requests at once.
        eos: tokens that end an answer.
    """

    def __init__(self, model: BatchModel, streams: int, eos: frozenset[int]) -> None:
        self._model, self._eos = model, eos
        self.rows = Rows(streams, model.resumable)
        self.waiting: deque[Stream] = deque()
        self.active: list[Stream] = []
        self.changed = threading.Condition()
        self.counted = dict.fromkeys(
            ("prompt_tokens", "cached_tokens", "generated_tokens", "drafted_tokens", "accepted_tokens"), 0
        )
        self.costs, self._clock = Costs(), 0

    def step(self) -> None:
        """One piece of one prompt, and one token of every answer, or some of an answer that repeats what stands."""
        for stream in [stream for stream in self.active if stream.cancelled.is_set()]:
            self._finish(stream, "cancelled")
        self._admit()
        unread = [stream for stream in self.active if stream.token is None]
        if unread:
            # in turns, so that a short prompt does not wait behind a long one
            self._prefill(min(unread, key=lambda stream: stream.served))
        decoding = [stream for stream in self.active if stream.token is not None]
        groups: dict[Stream | str | None, list[Stream]] = {}
        for stream in decoding:
            apart = stream.seeded or self._owed(stream)
            groups.setdefault(stream if apart else stream.request.adapter, []).append(stream)
        alone = len(self.active) == 1
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
        while self.waiting:
            stream = self.waiting[0]
            if stream.cancelled.is_set():
                with self.changed:
                    self.waiting.popleft()
                stream.listener(TokenEvent(finish="cancelled"))
                continue
            shared = 0 if stream.fresh else self.rows.shared(stream.looked.keys, stream.scope)
            row = self.rows.admit(stream.looked.keys, stream.scope, reuse=not stream.fresh)
            if row is None:
                return
            stream.row, stream.shared = row, shared
            self._model.resume(row, len(self.rows.histories[row]))
            self._found(stream, len(self.rows.histories[row]))
            with self.changed:
                self.active.append(self.waiting.popleft())

    def _found(self, stream: Stream, filled: int) -> None:
        """Count what needs no computing."""
        self.counted["cached_tokens"] += filled - stream.filled
        stream.cached += filled - stream.filled
        stream.filled = filled

    def _prefill(self, stream: Stream) -> None:
        prompt, keys, history = stream.request.prompt_ids, stream.looked.keys, self.rows.histories[stream.row]
        source, common = (stream.row, 0) if stream.fresh else self.rows.longest(keys, stream.row)
        if common:
            self._model.copy(source, stream.row, common)
            history[:] = keys[:common]
            self._found(stream, common)
        begin = stream.filled
        end = self._end_of_piece(stream)
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
        self._saw(stream, begin, self._model.hidden)
        history += keys[begin:end]
        stream.filled += len(piece)
        self._keep_states(stream)
        self._clock += 1
        stream.served = self._clock
        self.counted["prompt_tokens"] += len(piece)
        if told:
            stream.listener(TokenEvent(prompt=told, cached_tokens=stream.cached))
        if stream.filled == len(prompt):
            self._finish(stream, "length") if stream.request.max_new_tokens == 0 else self._draw(stream, logits)

    def _end_of_piece(self, stream: Stream) -> int:
        """Where another prompt went on otherwise, too, if states are to be kept there."""
        end = min(stream.filled + PREFILL_CHUNK, len(stream.request.prompt_ids))
        if self._model.states and stream.filled + LEAST_PREFIX <= stream.shared < end:
            return stream.shared
        return end

    def _keep_states(self, stream: Stream) -> None:
        """For prompts that share a beginning with this one, and for its next turn, whose template changes its end."""
        left = len(stream.request.prompt_ids) - stream.filled
        parts = stream.filled <= stream.shared < stream.filled + LEAST_PREFIX
        if self._model.states and (parts or any(least <= left < least + PREFILL_CHUNK for least in DISTANCES)):
            self._model.states.keep(stream.row)

    def _decode(self, streams: list[Stream]) -> None:
        """One token for each, with one adapter; rows between them are computed for nothing, behind what they hold."""
        histories, owed = self.rows.histories, self._owed(streams[0])
        first, last = min(stream.row for stream in streams), max(stream.row for stream in streams)
        # a stream that owes tokens is alone
        tokens = np.zeros((last - first + 1, len(owed) + 1), np.int64)
        past = [min(len(history), self._model.capacity - 1) for history in histories[first : last + 1]]
        past[0] -= len(owed)
        for stream in streams:
            tokens[stream.row - first] = *owed, cast("int", stream.token)
        for row in range(first, last + 1):
            del histories[row][past[row - first] + len(owed) :]
        positions, adapter = self._positions(streams, first, past, tokens.shape[1]), streams[0].request.adapter
        idle = set(range(first, last + 1)) - {stream.row for stream in streams}
        begin = time.perf_counter()
        logits = self._model.extend(first, tokens, past, positions=positions, adapter=adapter, idle=idle)
        if len(self.active) == 1:
            self.costs.note(tokens.shape[1], time.perf_counter() - begin)
        for stream in streams:
            histories[stream.row].append(int(tokens[stream.row - first, -1]))
            self.rows.touch(stream.row)
            self._saw(stream, past[stream.row - first], self._model.hidden[stream.row - first :])
        for stream, row in [(stream, stream.row) for stream in streams]:
            self._draw(stream, logits[row - first])

    def _verify(self, stream: Stream) -> bool:
        """A step with guessed tokens behind the one that waits; false when none is worth it, and nothing was done.

        Each token is drawn as it would be without: the first that differs from the guess is the last of the step. What
        the row holds of wrong guesses stands behind its history and is written over. GroupQueryAttention takes
        several tokens of one row alone, so that the step is not shared.
        """
        most = stream.request.max_new_tokens - stream.drawn - 1
        guess = stream.speculator.propose(most) if stream.speculator and not self._owed(stream) else []
        if not guess or not stream.speculator:
            return False
        history, row = self.rows.histories[stream.row], stream.row
        tokens = [cast("int", stream.token), *guess]
        positions, ids = self._positions([stream], row, [len(history)], len(tokens)), np.array(tokens, np.int64)
        adapter, begin = stream.request.adapter, time.perf_counter()
        logits = self._model.every_position(row, ids, len(history), positions=positions, adapter=adapter, guessed=True)
        if len(self.active) == 1:
            self.costs.note(len(tokens), time.perf_counter() - begin)
        self.rows.touch(row)
        held, behind = len(history), len(history) + len(tokens)
        right = self._drawn(stream, history, tokens, logits)
        self._saw(stream, held, self._model.hidden[:, : right + 1])
        # of an answer that has ended, another may have the row
        goes_on = stream in self.active
        if goes_on and right == len(guess):
            self._model.settle(row, behind)
        again = len(self._owed(stream)) if goes_on else 0
        stream.rest += stream.speculator.settle(len(guess), right, again) - 1
        self.counted["drafted_tokens"] += len(guess)
        self.counted["accepted_tokens"] += right
        return True

    def _saw(self, stream: Stream, position: int, hidden: Floats) -> None:
        """A step computed hidden states [1 or more, t, width], of which the first row's are the stream's."""
        if self._model.draft_head and stream.speculator:
            stream.speculator.saw(position, hidden[0])

    def _owed(self, stream: Stream) -> list[int]:
        """Tokens that stand in its row and not in its states, since wrong guesses stood behind them."""
        history = self.rows.histories[stream.row]
        return history[self._model.resumable(stream.row, len(history)) :]

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
        if stream.request.stop_on_eos and token in self._eos:
            self._finish(stream, "stop", (token, logprob, top) if stream.request.scored else (None, None, ()))
            return False
        stream.token = token
        stream.drawn += 1
        if stream.speculator:
            stream.speculator.hear(token)
        self.counted["generated_tokens"] += 1
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
        with self.changed:
            self.active.remove(stream)
        end = self.rows.release(stream.row)
        if end is None:
            return
        moved = next(other for other in self.active if other.row == end)
        self._model.copy(end, stream.row, len(self.rows.histories[end]))
        self.rows.move(end, stream.row)
        moved.row = stream.row
