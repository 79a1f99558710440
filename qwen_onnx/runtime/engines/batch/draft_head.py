"""A model's head for multi-token prediction, which guesses the tokens behind the next one.

The head makes of a token and of the hidden state before it the hidden state that the model will have behind it, or
nearly: the model's own head makes logits of that, whose likeliest token is the guess. A guess that it reads itself
gives the next guess. It has keys and values of its own, which are kept for one answer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from qwen_onnx.artifact.draft_head import DRAFT_HEAD, EMBEDDED, HIDDEN, NEXT, PLACES
from qwen_onnx.errors import ArtifactError
from qwen_onnx.runtime.engines.batch.ends import CommonHead, Table
from qwen_onnx.runtime.engines.batch.layout import Floats, KvLayout, zeros
from qwen_onnx.runtime.engines.batch.session import open_session
from qwen_onnx.runtime.engines.batch.sight import Sense

PAST, PRESENT = ("past_key_values.0.key", "past_key_values.0.value"), ("present.0.key", "present.0.value")
# tokens before an answer that the head reads, one layer each: more would cost more than it tells
WINDOW = 32
FLOAT = "tensor(float)"


class DraftHead:
    """``mtp.onnx`` of an artifact, and the model's embedding and head around it.

    Attributes:
        width: of a hidden state.

    Args:
        folder: of the artifact; graph: its decoder's file.
        threads: within an operator; None leaves it to onnxruntime.
        layout: of the model's keys and values, whose heads those of this head are like.
        sense: embeds tokens of a model that sees; None: the graph does.

    Raises:
        ArtifactError: it does not load, has other inputs or outputs than our exporter gives it, or does not fit the
            decoder.
    """

    def __init__(self, folder: Path, graph: Path, threads: int | None, layout: KvLayout, sense: Sense | None) -> None:
        self._session = open_session(
            folder / DRAFT_HEAD, threads, called="the head for multi-token prediction", taking_turns=True
        )
        self._layout, self._head = layout, CommonHead(graph, threads)
        self._table = sense or Table(graph, threads)
        inputs = {entry.name: entry for entry in self._session.get_inputs()}
        outputs = {entry.name: entry for entry in self._session.get_outputs()}
        floats = {HIDDEN, EMBEDDED, *PAST}
        known = inputs.keys() == {*floats, "attention_mask", "position_ids"} and outputs.keys() == {NEXT, *PRESENT}
        typed = known and {(inputs | outputs)[name].type for name in (*floats, *outputs)} == {FLOAT}
        if not typed or any(inputs[name].shape[1] != layout.heads for name in PAST):
            text = f"{DRAFT_HEAD} is not the head of this model: {sorted(inputs)} to {sorted(outputs)}"
            raise ArtifactError(text, where=str(folder), hint="get the artifact again, or build it")
        if self._table.embed(np.zeros((1, 1), np.int64)).shape[-1] != inputs[HIDDEN].shape[2]:
            text = f"{DRAFT_HEAD} has states of {inputs[HIDDEN].shape[2]} numbers, the model has others"
            raise ArtifactError(text, where=str(folder), hint="get the artifact again, or build it")
        self._axes, self.width = inputs["position_ids"].shape[0], inputs[HIDDEN].shape[2]

    def cache(self, places: int) -> list[Floats]:
        """Room for the keys and values of an answer's first ``places`` tokens."""
        sizes = (1, self._layout.heads, places, self._layout.head_size)
        return [zeros(sizes, np.float32) for _ in PAST]

    def embed(self, tokens: Sequence[int]) -> Floats:
        """The model's embeddings of t tokens, [1, t, width]."""
        found: Floats = self._table.embed(np.array([tokens], np.int64)).astype(np.float32, copy=False)
        return found

    def step(self, tokens: Sequence[int], hidden: Floats, cache: list[Floats], past: int) -> Floats:
        """Hidden states behind ``tokens``, [t, width].

        Args:
            tokens: t of them; hidden: of the model before each, [t, width].
            cache: their keys and values are put behind the ``past`` that it holds.
        """
        count = len(tokens)
        binding = self._session.io_binding()
        binding.bind_cpu_input(EMBEDDED, self.embed(tokens))
        binding.bind_cpu_input(HIDDEN, np.ascontiguousarray(hidden[None]))
        binding.bind_cpu_input("attention_mask", np.ones((1, past + count), np.int64))
        places = np.arange(past, past + count, dtype=np.int64)
        binding.bind_cpu_input("position_ids", np.broadcast_to(places, (self._axes, 1, count)).copy())
        for taken, given, buffer in zip(PAST, PRESENT, cache, strict=True):
            binding.bind_input(taken, "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
            binding.bind_output(given, "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
        found = np.empty((1, count, hidden.shape[-1]), np.float32)
        binding.bind_output(NEXT, "cpu", 0, np.float32, found.shape, found.ctypes.data)
        self._session.run_with_iobinding(binding)
        states: Floats = found[0]
        return states

    def likeliest(self, hidden: Floats) -> int:
        """The token that most likely follows where ``hidden`` [width] is the state."""
        return self._head.likeliest(hidden)


class Ahead:
    """What the head knows of one answer.

    Args:
        most: tokens that the answer may have.
        unread: tokens whose embeddings are not the table's: those of media.
    """

    def __init__(self, head: DraftHead, most: int, unread: Collection[int] = ()) -> None:
        self._head, self._unread = head, set(unread)
        self._places = min(PLACES, 2 * WINDOW + most)
        self._cache: list[Floats] = []
        # hidden states that the head has not read, up to the position ``_end``; it has read ``_read`` before them
        self._states: list[Floats] = []
        self._end, self._read = 0, 0

    def saw(self, position: int, hidden: Floats) -> None:
        """The model's hidden states [t, width] behind the tokens from ``position`` on, of which it knew some."""
        new = position + len(hidden) - self._end
        if new <= 0:
            return
        if position > self._end:
            self._forget()
        self._states.extend(hidden[-new:].copy())
        self._end = position + len(hidden)
        if len(self._states) > WINDOW:
            self._forget(WINDOW)

    def guess(self, text: Sequence[int], count: int) -> list[int]:
        """The ``count`` tokens that may follow ``text``; none where its last states are not known.

        Args:
            text: prompt and answer; the model has read all but the last token.
        """
        begin = self._end - len(self._states) + 1
        tokens = list(text[begin:])
        if self._end != len(text) - 1 or self._read + len(tokens) + count > self._places:
            self._forget(min(WINDOW, len(self._states)))
            return []
        media = [index for index, token in enumerate(tokens) if token in self._unread]
        if media:
            self._forget(len(tokens) - 1 - media[-1])
            tokens = tokens[media[-1] + 1 :]
        if not tokens:
            return []
        self._cache = self._cache or self._head.cache(self._places)
        state = self._head.step(tokens, np.stack(self._states), self._cache, self._read)[-1]
        self._read, self._states = self._read + len(tokens), []
        guesses = [self._head.likeliest(state)]
        # what it reads of its own guesses is written over
        while len(guesses) < count:
            past = self._read + len(guesses) - 1
            state = self._head.step(guesses[-1:], state[None], self._cache, past)[-1]
            guesses.append(self._head.likeliest(state))
        return guesses

    def _forget(self, kept: int = 0) -> None:
        """Begin anew with the last ``kept`` of the states that it has not read."""
        self._read, self._states = 0, self._states[len(self._states) - kept :]
