"""The graph of an artifact over rows of a KV cache, run by ONNX Runtime itself.

genai's static engine makes a late request wait until the batch has drained, and its dynamic engine needs a graph for
paged attention, which the CPU lacks. The stock graph can do more than genai asks of it: GroupQueryAttention takes a
length per row, and past and present may be the same memory. So each row of one large buffer is a conversation of its
own, and any neighbouring rows make a batch. Linear attention has states beside it. Figures: docs/lab-log.md.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from qwen_onnx.artifact.adapter_file import SlotAdapter, names_in_file
from qwen_onnx.artifact.draft_head import has_draft_head
from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.errors import ArtifactError
from qwen_onnx.processes.memory import return_free_memory
from qwen_onnx.runtime.engines.adapters import AdapterSource, Swapping
from qwen_onnx.runtime.engines.batch.draft_head import DraftHead
from qwen_onnx.runtime.engines.batch.ends import HIDDEN, with_hidden
from qwen_onnx.runtime.engines.batch.head import POSITIONS, with_positions
from qwen_onnx.runtime.engines.batch.int8_cache import Scales, with_int8_cache
from qwen_onnx.runtime.engines.batch.layout import (
    Floats,
    KvLayout,
    UnsupportedGraphError,
    capacity_of,
    logits_of,
    zeros,
)
from qwen_onnx.runtime.engines.batch.session import open_with_slots
from qwen_onnx.runtime.engines.batch.shelf import Shelf
from qwen_onnx.runtime.engines.batch.sight import TYPES, sense_of
from qwen_onnx.runtime.engines.batch.states import APART, States, Step, state_names
from qwen_onnx.runtime.engines.genai import Shape
from qwen_onnx.runtime.engines.media import Positions

# of a graph that has them made of token ids and media
EMBEDDED = "inputs_embeds"
INT8: dict[str, type[np.generic]] = {"tensor(int8)": np.int8}
# neighbours in a batch are rounded otherwise than a row alone, but the logits stay nearly parallel
LEAST_COSINE = 0.98


class BatchModel:
    """Rows that are filled and continued independently.

    Attributes:
        states: of linear attention; None: the graph has none.
        draft_head: for multi-token prediction; None: the artifact has none, or it was not asked for.
        hidden: states of the last step behind each token, [n, t, width], where there is such a head; valid until the
            next call.

    Args:
        folder: flat folder with ``genai_config.json`` and ``model.onnx``.
        rows: conversations at once.
        capacity: tokens of a row; None takes the context, or what the free memory allows.
        chunk: most tokens that go in at once.
        threads: threads within an operator; None leaves it to onnxruntime.
        adapters: that rows may be computed with.
        swapping: others may be put beside them later.
        kv_scales: keeps keys and values in int8 by the scales that this gives; None: in the graph's own type.
        drafts: load the head for multi-token prediction, if the artifact has one.

    Raises:
        UnsupportedGraphError: the graph has other inputs, its rows are not independent, or it has no int8 cache.
        ArtifactError: the graph does not load, or an adapter does not fit it. EnvironmentFault: too little memory for
            the rows. Whatever ``kv_scales`` raises.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rows: int,
        capacity: int | None = None,
        chunk: int = 64,
        threads: int | None = None,
        adapters: Sequence[AdapterSource] = (),
        swapping: Swapping | None = None,
        kv_scales: Scales | None = None,
        drafts: bool = False,
    ) -> None:
        if (adapters or swapping) and kv_scales is not None:
            what = "an int8 KV cache has the scales of the model without adapters"
            raise ArtifactError(
                what, where=str(folder), hint="leave --adapter and --adapter-folder out, or --kv-cache int8"
            )
        shape = Shape.read(folder)
        if shape.provider != "cpu":
            raise UnsupportedGraphError(
                f"built for {shape.provider}, which onnxruntime-genai drives", where=str(folder)
            )
        layout = KvLayout.read(folder)
        # where others may come, any slot may be filled
        filled = None if swapping else {name for source in adapters for name in names_in_file(source.file)}
        # with the slots, and for the model alone
        graph, drafts = folder / GenaiConfig.read(folder).graph_file, drafts and has_draft_head(folder)
        self._sessions = _sessions(graph, threads, layout, kv_scales, filled, hidden=drafts)
        self._inputs = {entry.name: entry for entry in self._sessions[0].get_inputs()}
        states, layout = state_names(folder, self._inputs), layout.within(self._inputs)
        past = {name for name, _ in (*layout.names, *states)}
        foreign = sorted(
            set(self._inputs) - past - {"input_ids", "attention_mask", "position_ids", POSITIONS, EMBEDDED}
        )
        if foreign or not layout.names or "attention_mask" not in self._inputs:
            raise UnsupportedGraphError(
                f"the graph keeps other state than keys and values and linear attention's: {foreign}", where=str(folder)
            )
        self.sense = sense_of(folder, threads) if EMBEDDED in self._inputs else None
        if self.sense is not None:
            self.sense.require(self._inputs[EMBEDDED], folder)
        types = TYPES if kv_scales is None else INT8
        outputs = {entry.name: entry for entry in self._sessions[0].get_outputs()}
        logits = logits_of([*self._inputs.values(), *outputs.values()], layout, shape, folder, types)
        self._type = types[self._inputs[layout.names[0][0]].type]
        self.vocab_size = shape.vocab_size
        entries = self._inputs | outputs
        self.states = States(rows, states, entries, folder) if states else None
        fixed = (1 + APART) * self.states.row_bytes if self.states else 0
        self.capacity = capacity_of(shape.context_length, capacity, rows, layout, np.dtype(self._type).itemsize, fixed)
        self.rows, self._layout = rows, layout
        sizes = (rows, layout.heads, self.capacity, layout.head_size)
        self._kv = [zeros(sizes, self._type) for _ in layout.names]
        # a pruned head that could not be opened computes the logits of the last token alone
        self._pruned = logits.shape[1] == 1
        self._logits = np.zeros((max(rows, chunk), self.vocab_size), TYPES[logits.type])
        self.draft_head, self.hidden = None, np.zeros((0, 0, 0), np.float32)
        if drafts:
            self.draft_head = DraftHead(folder, graph, threads, layout, self.sense)
            self._hidden = np.zeros((max(rows, chunk), self.draft_head.width), np.float32)
        self.adapters = Shelf(folder, self._sessions[0], adapters, swapping, filled)
        self._bindings: dict[tuple[int, int, str | None, Step | None], Any] = {}
        self._check_rows()

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory of one token in one row."""
        return self._layout.bytes_per_token(np.dtype(self._type).itemsize)

    @property
    def tells_every_position(self) -> bool:
        """Whether ``every_position`` can be asked for."""
        return not self._pruned

    def extend(
        self,
        first: int,
        tokens: np.ndarray[Any, Any],
        past: Sequence[int],
        *,
        positions: Positions | None = None,
        features: Floats | None = None,
        adapter: str | None = None,
        idle: Collection[int] = (),
    ) -> Floats:
        """Put tokens behind what neighbouring rows hold.

        Args:
            first: the first row.
            tokens: int64 [n, t]; row ``first + i`` gets ``tokens[i]``.
            past: tokens that each row holds, n numbers.
            positions: int64 [3, n, t], of a model that sees; None: those of text, one after the other.
            features: of the media's tokens among ``tokens``, [such tokens, width]; see ``Table``.
            adapter: one of ``adapters``, for all of these rows; None: the model alone.
            idle: rows among them that are computed for nothing, and stay as they are.

        Returns:
            Logits after the last token of each row, float32 [n, vocab_size]; valid until the next call.
        """
        found = self._run(first, tokens, past, positions, features, adapter, every=False, idle=idle)
        self._take([row for row in range(first, first + len(tokens)) if row not in idle], first, past, tokens.shape[1])
        logits: Floats = found[:, -1].astype(np.float32, copy=False)
        return logits

    def every_position(
        self,
        row: int,
        tokens: np.ndarray[Any, Any],
        past: int,
        *,
        positions: Positions | None = None,
        features: Floats | None = None,
        adapter: str | None = None,
        guessed: bool = False,
    ) -> Floats:
        """Put at most ``chunk`` tokens behind what one row holds.

        Args:
            tokens: int64 [t]; past: tokens that the row holds. Others: see ``extend``.
            guessed: states stay behind ``past`` until ``settle``.

        Returns:
            Logits after each of the tokens, float32 [t, vocab_size]; valid until the next call.
        """
        found = self._run(row, tokens[None], [past], positions, features, adapter, every=True)
        if not guessed:
            self._take([row], row, [past], len(tokens))
        logits: Floats = found[0].astype(np.float32, copy=False)
        return logits

    def _take(self, rows: Sequence[int], first: int, past: Sequence[int], new: int) -> None:
        for row in rows:
            self.settle(row, past[row - first] + new)

    def _run(
        self,
        first: int,
        tokens: np.ndarray[Any, Any],
        past: Sequence[int],
        positions: Positions | None,
        features: Floats | None,
        adapter: str | None,
        *,
        every: bool,
        idle: Collection[int] = (),
    ) -> np.ndarray[Any, Any]:
        """Logits [n, positions, vocab_size] after the last token, or those after each of them."""
        count, new = tokens.shape
        step = self.states.begin(first, past, idle) if self.states else None
        mask = np.zeros((count, max(past) + new), np.int64)
        for row, length in enumerate(past):
            mask[row, : length + new] = 1
        binding = self._binding(first, count, adapter, step)
        if self.sense is None:
            binding.bind_cpu_input("input_ids", np.ascontiguousarray(tokens))
        else:
            binding.bind_cpu_input(EMBEDDED, self.sense.embed(np.ascontiguousarray(tokens), features))
        binding.bind_cpu_input("attention_mask", mask)
        if "position_ids" in self._inputs:
            plain = np.asarray(past, np.int64)[:, None] + np.arange(new, dtype=np.int64)
            if len(self._inputs["position_ids"].shape) > plain.ndim:
                # for text the three axes are equal
                plain = np.broadcast_to(plain, (3, *plain.shape)) if positions is None else positions
            binding.bind_cpu_input("position_ids", np.ascontiguousarray(plain))
        chosen = POSITIONS in self._inputs
        if chosen:
            wanted = np.arange(new, dtype=np.int64) if every else np.array([-1], np.int64)
            binding.bind_cpu_input(POSITIONS, wanted)
        kept = 1 if self._pruned or (chosen and not every) else new
        logits = self._logits[: count * kept].reshape(count, kept, self.vocab_size)
        binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        if self.draft_head:
            self.hidden = self._hidden[: count * new].reshape(count, new, -1)
            binding.bind_output(HIDDEN, "cpu", 0, np.float32, self.hidden.shape, self.hidden.ctypes.data)
        self._sessions[adapter is None].run_with_iobinding(binding)
        return logits

    def _binding(self, first: int, count: int, adapter: str | None, step: Step | None) -> Any:
        """Past and present of these rows are one memory, which GroupQueryAttention then writes in place."""
        if (first, count, adapter, step) not in self._bindings:
            binding = self._sessions[adapter is None].io_binding()
            shape = (count, self._layout.heads, self.capacity, self._layout.head_size)
            for (past, present), buffer in zip(self._layout.names, self._kv, strict=True):
                address = buffer[first:].ctypes.data
                binding.bind_input(past, "cpu", 0, self._type, shape, address)
                binding.bind_output(present, "cpu", 0, self._type, shape, address)
            if self.states and step:
                self.states.bind(binding, first, count, step)
            # bound by address: IOBinding knows no input that has a value of its own by its array
            for name, tensor in self.adapters[adapter].tensors.items() if adapter is not None else ():
                binding.bind_input(name, "cpu", 0, tensor.dtype.type, tensor.shape, tensor.ctypes.data)
            self._bindings[first, count, adapter, step] = binding
        return self._bindings[first, count, adapter, step]

    def put_adapter(self, name: str, adapter: SlotAdapter, busy: Collection[str | None]) -> None:
        """See ``Shelf.put``; ``busy`` are those that rows are being computed with."""
        for dropped in self.adapters.put(name, adapter, busy):
            self._unbind(dropped)

    def drop_adapter(self, name: str, busy: Collection[str | None]) -> None:
        """See ``Shelf.drop``."""
        self.adapters.drop(name, busy)
        self._unbind(name)

    def _unbind(self, name: str) -> None:
        """Bindings hold addresses of memory that is freed now; rows of others may be computed meanwhile."""
        for key in [key for key in list(self._bindings) if key[2] == name]:
            del self._bindings[key]

    def resumable(self, row: int, tokens: int) -> int:
        """The most of the first ``tokens`` of a row that it can go on behind."""
        return self.states.within(row, tokens) if self.states else tokens

    def resume(self, row: int, tokens: int) -> None:
        """Forget what a row holds behind ``tokens``, one of ``resumable``."""
        if self.states:
            self.states.rewind(row, tokens)

    def settle(self, row: int, tokens: int) -> None:
        """What the last step put into a row stays, which is behind ``tokens`` now."""
        if self.states:
            self.states.take(row, tokens)

    def held(self, row: int, tokens: int) -> np.ndarray[Any, Any]:
        """Keys and values of a row's first ``tokens``, [layers, 2, heads, tokens, head size]."""
        found = np.stack([buffer[row, :, :tokens] for buffer in self._kv])
        return found.reshape(self._layout.layers, 2, *found.shape[1:])

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The first ``tokens`` of a row into another."""
        if self.states:
            self.states.copy(source, target, tokens)
        for buffer in self._kv:
            buffer[target, :, :tokens] = buffer[source, :, :tokens]

    def _check_rows(self) -> None:
        """Rows of different lengths, one after the other and as a batch, must say the same."""
        if self.rows < 2:
            return
        prompts = ([1, 2, 3, 4, 5], [6, 7])
        for row, prompt in enumerate(prompts):
            self.extend(row, np.array([prompt]), [0])
        lengths = [len(prompt) for prompt in prompts]
        next_tokens = np.array([[8], [9]])
        pieces = [(row, next_tokens[row : row + 1], lengths[row : row + 1]) for row in (0, 1)]
        alone = [self.extend(*piece, idle={piece[0]})[0].copy() for piece in pieces]
        together = self.extend(0, next_tokens, lengths)
        for one, both in zip(alone, together, strict=True):
            cosine = float(one @ both / (np.linalg.norm(one) * np.linalg.norm(both)))
            if not cosine >= LEAST_COSINE:
                raise UnsupportedGraphError(f"the rows of a batch are not independent (cosine {cosine:.3f})")


def _sessions(
    graph: Path,
    threads: int | None,
    layout: KvLayout,
    kv_scales: Scales | None,
    filled: Collection[str] | None,
    *,
    hidden: bool,
) -> tuple[ort.InferenceSession, ort.InferenceSession]:
    """See ``open_with_slots``; ``hidden``: with hidden states among the outputs."""

    def int8(graph: Any) -> bool:
        if kv_scales is None:
            return False
        if EMBEDDED in {entry.name for entry in graph.input}:
            raise UnsupportedGraphError("an int8 KV cache has the scales of text, and this model takes more")
        if not with_int8_cache(graph, layout.names, lambda: kv_scales(layout.scales)):
            raise UnsupportedGraphError("not every layer keeps its keys and values in GroupQueryAttention")
        return True

    changes = [*([with_hidden] if hidden else ()), with_positions, int8]
    # a head's threads would wait for those of the decoder, which spin: 14 ms a guess in place of 5
    sessions = open_with_slots(graph, threads, changes, filled, taking_turns=hidden)
    # what they folded meanwhile
    return_free_memory()
    return sessions
