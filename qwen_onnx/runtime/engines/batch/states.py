"""What linear attention remembers of each row: memory of one size, in which nothing can be taken back.

Keys and values stand one behind the other, so that a row is cut wherever one likes. A state is what all tokens so far
have made of it. So each row has two sides: a step reads the states of one and writes those of the other, to which the
row then turns if it should. Guesses that turn out wrong, and a row between others, leave nothing behind. Copies of some
are kept, from which a later prompt goes on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_onnx.artifact.genai_config import GENAI_CONFIG, GenaiConfig
from qwen_onnx.errors import ArtifactError
from qwen_onnx.processes.memory import free_memory
from qwen_onnx.runtime.engines.batch.layout import zeros
from qwen_onnx.runtime.engines.batch.sight import TYPES

Array = np.ndarray[Any, Any]
# places in the memory, both sides and one more: what a step reads and what it writes
Step = tuple[int, int]
APART = 2
# copies for each row, and the share of the free memory that they may have
COPIES, COPIES_SHARE = 4, 0.1


def state_names(folder: Path, inputs: Collection[str]) -> list[tuple[str, str]]:
    """Past and present of every state that the graph has, as ``genai_config.json`` names them."""
    decoder = GenaiConfig.read(folder).model.decoder
    kinds = (
        (decoder.inputs.past_conv_names, decoder.outputs.present_conv_names),
        (decoder.inputs.past_recurrent_names, decoder.outputs.present_recurrent_names),
    )
    named = [(past, present) for past, present in kinds if past is not None and present is not None]
    layers = range(decoder.num_hidden_layers or 0)
    every = [(past % layer, present % layer) for layer in layers for past, present in named]
    return [pair for pair in every if pair[0] in inputs]


class States:
    """The states of all rows.

    Attributes:
        at: tokens that each row's states are behind.

    Args:
        rows: of the batch.
        names: see ``state_names``.
        entries: inputs and outputs of the graph by name.
        folder: of the artifact, for messages.

    Raises:
        ArtifactError: a state has no fixed size, or another one when it comes out.
    """

    def __init__(self, rows: int, names: list[tuple[str, str]], entries: Mapping[str, Any], folder: Path) -> None:
        self.names = names
        sizes = []
        for past, present in names:
            size, kind = _size_of(past, entries, folder), TYPES.get(entries[past].type)
            if size is None or kind is None or _size_of(present, entries, folder) != size:
                text = f"{past} and {present} are no states of one size and type, as {GENAI_CONFIG} has it"
                raise ArtifactError(text, where=str(folder), hint="get the artifact again, or build it")
            sizes.append(((rows, *size), kind))
        self._memory = tuple([zeros(*size, sparse=False) for size in sizes] for _ in range(1 + APART))
        self._side = [0] * rows
        self._step: Step = (0, 1)
        self.row_bytes = sum(array[0].nbytes for array in self._memory[0])
        self.at = [0] * rows
        fitting = int(free_memory() * COPIES_SHARE) // max(self.row_bytes, 1)
        self._most = max(rows, min(COPIES * rows, fitting))
        # by row and tokens, least recently used first; nobody writes into a copy, so that rows may share it
        self._copies: OrderedDict[tuple[int, int], list[Array]] = OrderedDict()

    def bind(self, binding: Any, first: int, count: int, step: Step) -> None:
        """The states of neighbouring rows, for a step as ``begin`` has it."""
        for name, reads, writes in zip(self.names, *(self._memory[place] for place in step), strict=True):
            for called, bind, array in ((name[0], binding.bind_input, reads), (name[1], binding.bind_output, writes)):
                bind(called, "cpu", 0, array.dtype.type, (count, *array.shape[1:]), array[first:].ctypes.data)

    def begin(self, first: int, past: Sequence[int], idle: Collection[int]) -> Step:
        """A step continues rows from ``first`` on, each behind so many tokens; behind none it starts anew.

        Args:
            idle: rows among them that stay as they are.

        Raises:
            ValueError: the states of a row are behind another number of tokens.
        """
        busy = [(row, at) for row, at in enumerate(past, first) if row not in idle]
        side = self._side[busy[0][0] if busy else first]
        for row, at in busy:
            if at == 0:
                self.rewind(row, 0)
            if self.at[row] != at:
                raise ValueError(f"the states of row {row} are behind {self.at[row]} tokens, not {at}")
            if self._side[row] != side:
                values, self._side[row] = self._now(row), side
                self._put(row, values)
        # what an idle row would get goes where no row reads
        self._step = (side, APART if idle else 1 - side)
        return self._step

    def take(self, row: int, at: int) -> None:
        """The row goes on with what the last step wrote; its states are behind ``at`` tokens now."""
        written = self._step[1]
        if written == APART:
            self._put(row, [array[row] for array in self._memory[APART]])
        else:
            self._side[row] = written
        self.at[row] = at

    def keep(self, row: int) -> None:
        """Keep a copy of what they are now; the least recently used one makes room."""
        key = row, self.at[row]
        if key not in self._copies:
            self._copies[key] = [array.copy() for array in self._now(row)]
        self._copies.move_to_end(key)
        while len(self._copies) > self._most:
            self._copies.popitem(last=False)

    def within(self, row: int, tokens: int) -> int:
        """The most of the row's first ``tokens`` that it can go on behind: those of a copy, or where it is."""
        return max((at for at in self._known(row) if at <= tokens), default=0)

    def _known(self, row: int) -> Iterator[int]:
        yield self.at[row]
        yield from (at for owner, at in self._copies if owner == row)

    def rewind(self, row: int, tokens: int) -> None:
        """Back to behind ``tokens``, one of ``within``; what was behind more of them is forgotten."""
        # behind none they are zero already
        if tokens == 0 and self.at[row]:
            for array in self._now(row):
                array[...] = 0
        elif self.at[row] != tokens:
            self._put(row, self._copies[row, tokens])
        self.at[row] = tokens
        self._forget(row, tokens)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The first ``tokens`` of a row into another: as many of them as ``within`` tells."""
        at = self.within(source, tokens)
        self._forget(target, -1)
        if at == self.at[source]:
            self._put(target, self._now(source))
        elif at:
            self._put(target, self._copies[source, at])
        else:
            self.rewind(target, 0)
        self.at[target] = at
        for owner, known in list(self._copies):
            if owner == source and known <= at:
                self._copies[target, known] = self._copies[source, known]

    def _now(self, row: int) -> list[Array]:
        return [array[row] for array in self._memory[self._side[row]]]

    def _put(self, row: int, values: list[Array]) -> None:
        for array, value in zip(self._now(row), values, strict=True):
            array[...] = value

    def _forget(self, row: int, tokens: int) -> None:
        for key in [key for key in self._copies if key[0] == row and key[1] > tokens]:
            del self._copies[key]


def _size_of(name: str, entries: Mapping[str, Any], folder: Path) -> tuple[int, ...] | None:
    """Sizes of one row's state; None where one has no number."""
    if name not in entries:
        raise ArtifactError(f"the graph has no {name}", where=str(folder), hint="get the artifact again, or build it")
    sizes = tuple(entries[name].shape[1:])
    return sizes if sizes and all(isinstance(size, int) and size > 0 for size in sizes) else None
