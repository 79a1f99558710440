"""A graph in slices of a few layers: what is larger than the memory is run one slice after the other.

All texts go through a slice before the next is loaded; what crosses from one to the next waits in files. The slices
hold the graph's own nodes and weights, so they compute what the whole graph computes. Decoding does likewise: where the
tokens are known, all steps of a text can go through one slice and its KV cache before the next slice takes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_onnx.artifact.stored import FLOAT
from qwen_onnx.errors import VerificationError
from qwen_onnx.processes.progress import progress
from qwen_onnx.records import digest_of
from qwen_onnx.verify.graph import Graph
from qwen_onnx.verify.nibbles import in_nibbles
from qwen_onnx.verify.scoring import STATES, Session, open_session
from qwen_onnx.verify.softmax import Logits

LAYER = re.compile(r"/layers\.(\d+)/")
LOGITS = "logits"
PRESENT = "present."
Values = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Slice:
    """Neighbouring layers as a graph.

    Attributes:
        inputs: come from slices before it; ``outputs`` go to slices behind it.
        states: names of its layers' states before a run, and of the same behind it.
    """

    graph: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    states: tuple[tuple[str, str], ...]


class Cut:
    """A graph cut before every so many layers; the head with the norm before it is the last slice.

    Args:
        graph: with its final norm called after the layer behind the last, as genai's builder calls it.
        layers: of a slice.

    Raises:
        VerificationError: the graph has no layers that can be told apart.
    """

    def __init__(self, graph: Graph, layers: int) -> None:
        self.graph = graph
        numbers = [int(found[1]) for node in graph.nodes if (found := LAYER.search(node.name))]
        if not numbers:
            raise VerificationError("the graph cannot be cut: it names no layers", where=str(graph.file))
        self._constants = {tensor.name: tensor for tensor in graph.model.graph.initializer}
        self._given = {value.name: value for value in graph.model.graph.input}
        self._makers = {name: node for node in graph.nodes for name in node.output if name}
        self._fixed: dict[str, bool] = {}
        # the norm behind the last layer has a number of its own
        self.count = -(-max(numbers) // layers) + 1
        self._places: dict[str, int] = {}
        for node in graph.nodes:
            found = LAYER.search(node.name)
            own = self.count - 1 if "/lm_head/" in node.name else 0 if found is None else int(found[1]) // layers
            if found is not None and int(found[1]) == max(numbers):
                own = self.count - 1
            # what is made of constants is made anew wherever it is read
            read = [self._places.get(name, 0) for name in node.input if not self._is_fixed(name)]
            place = max([own, *read])
            self._places |= dict.fromkeys(filter(None, node.output), place)

    def _is_fixed(self, name: str) -> bool:
        """Whether a tensor follows from constants alone; such are made anew in every slice that reads them."""
        if name not in self._fixed:
            maker = self._makers.get(name)
            inputs = [] if maker is None else [item for item in maker.input if item]
            self._fixed[name] = name in self._constants or (
                maker is not None and all(self._is_fixed(item) for item in inputs)
            )
        return self._fixed[name]

    def __iter__(self) -> Iterator[Slice]:
        """The slices in order."""
        read: list[set[str]] = [set() for _ in range(self.count)]
        for node in self.graph.nodes:
            for name in node.input:
                if name in self._places and not self._is_fixed(name):
                    read[self._place(node)].add(name)
        for place in range(self.count):
            inputs = {name for name in read[place] if self._places[name] < place}
            later = set().union(*read[place + 1 :]) if place + 1 < self.count else {LOGITS}
            outputs = {name for name in later if self._places.get(name) == place}
            states = self._states(place)
            built = self._built(place, inputs, outputs | {present for _, present in states})
            yield Slice(built, tuple(sorted(inputs)), tuple(sorted(outputs)), states)

    def _states(self, place: int) -> tuple[tuple[str, str], ...]:
        found = []
        for value in self.graph.model.graph.output:
            rest = value.name.removeprefix(PRESENT)
            if rest != value.name and self._places[value.name] == place:
                found.append((next(past + rest for past in STATES if past + rest in self._given), value.name))
        return tuple(found)

    def _place(self, node: Any) -> int:
        return self._places[next(filter(None, node.output))]

    def _built(self, place: int, inputs: set[str], outputs: set[str]) -> bytes:
        import onnx

        nodes = [node for node in self.graph.nodes if self._place(node) == place and not self._is_fixed(node.output[0])]
        used = {name for node in nodes for name in node.input if name}
        fixed: set[str] = set()
        pending = [name for name in used if self._is_fixed(name)]
        while pending:
            name = pending.pop()
            if name not in fixed:
                fixed.add(name)
                pending += [item for item in getattr(self._makers.get(name), "input", ()) if item]
        made = [node for node in self.graph.nodes if set(node.output) & fixed]
        known = self.graph.types
        graph = onnx.helper.make_graph(
            [*made, *nodes],
            f"slice {place}",
            [
                *(value for name, value in self._given.items() if name in used),
                *(onnx.helper.make_tensor_value_info(name, known.get(name, FLOAT), None) for name in sorted(inputs)),
            ],
            [onnx.helper.make_tensor_value_info(name, known.get(name, FLOAT), None) for name in sorted(outputs)],
            [tensor for name, tensor in self._constants.items() if name in fixed | used],
        )
        whole = self.graph.model
        model = onnx.helper.make_model(graph, opset_imports=whole.opset_import, functions=whole.functions)
        model.ir_version = whole.ir_version
        serialized: bytes = model.SerializeToString()
        return serialized


class SlicedScorer:
    """The logits of an artifact that is larger than the memory; a ``Scorer``.

    Args:
        graph: of the artifact, not yet rewritten.
        threads: within an operator.
        scratch: folder for what crosses between slices.
        layers: of a slice.
        in_float32: see ``Graph.in_float32``.

    Raises:
        VerificationError: the graph cannot be cut, or a slice does not load.
    """

    def __init__(self, graph: Graph, threads: int, scratch: Path, layers: int, *, in_float32: bool = False) -> None:
        graph.every_position()
        if in_float32:
            graph.in_float32()
        self.folder, self.threads, self.in_float32 = graph.file.parent, threads, in_float32
        self.scratch = scratch / f"slices-{'float32' if in_float32 else 'served'}"
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.slices = list(Cut(graph, layers))
        self._ready: set[tuple[int, ...]] = set()
        self._head: Session | None = None

    def _open(self, part: Slice) -> Session:
        return open_session(part.graph, self.folder, self.threads, folded=not self.in_float32)

    def _file(self, ids: Sequence[int], name: str) -> Path:
        return self.scratch / f"{digest_of([list(ids), name])[:24]}.npy"

    def prepare(self, texts: Sequence[Sequence[int]]) -> None:
        """Run texts through all slices but the last."""
        new = [ids for ids in dict.fromkeys(tuple(text) for text in texts) if ids not in self._ready]
        self._head = None
        for number, part in enumerate(self.slices[:-1], 1) if new else ():
            progress(f"the artifact: slice {number} of {len(self.slices)}")
            session = self._open(part)
            needed = {name for later in self.slices[number:] for name in later.inputs}
            for ids in new:
                for name, value in zip(part.outputs, self._run(session, part, ids), strict=True):
                    np.save(self._file(ids, name), value)
                for name in set(part.inputs) - needed:
                    self._file(ids, name).unlink()
            # before the next is loaded
            del session
        self._ready |= set(new)

    def logits(self, ids: Sequence[int]) -> Logits:
        """Logits of shape [tokens, vocabulary] for one text."""
        if tuple(ids) not in self._ready:
            self.prepare([ids])
        if self._head is None:
            self._head = self._open(self.slices[-1])
        (found,) = self._run(self._head, self.slices[-1], ids)
        logits: Logits = found[0].astype(np.float32, copy=False)
        return logits

    def _run(self, session: Session, part: Slice, ids: Sequence[int]) -> list[np.ndarray[Any, Any]]:
        return session.run(list(part.outputs), ids, {name: np.load(self._file(ids, name)) for name in part.inputs})


def decoded(
    graph: Graph, threads: int, layers: int, texts: Sequence[Sequence[int]], *, in_float32: bool = False
) -> list[Logits]:
    """Logits of shape [tokens, vocabulary] for each text, token by token through the KV cache, slice after slice.

    Args:
        graph, threads, layers, in_float32: see ``SlicedScorer``.

    Raises:
        VerificationError: the graph cannot be cut, or a slice does not load.
    """
    # of float16, folding would make a float32 copy of every weight
    folded = not (in_float32 and graph.half)
    if in_float32:
        graph.in_float32()
        # for one token at a time, matrices of 8 bits would be made anew
        in_nibbles(graph)
    slices = list(Cut(graph, layers))
    # what has crossed so far, by text, by step
    crossing: list[list[Values]] = [[{} for _ in ids] for ids in texts]
    for number, part in enumerate(slices, 1):
        progress(f"decoding: slice {number} of {len(slices)}")
        session = open_session(part.graph, graph.file.parent, threads, folded=folded)
        needed = {name for later in slices[number:] for name in later.inputs} | {LOGITS}
        for ids, steps in zip(texts, crossing, strict=True):
            _decode(session, part, ids, steps, needed)
        # before the next is loaded
        del session
    found = []
    for steps in crossing:
        found.append(np.concatenate([step[LOGITS][0] for step in steps]).astype(np.float32, copy=False))
        # else all logits would be there twice
        steps.clear()
    return found


def _decode(session: Session, part: Slice, ids: Sequence[int], steps: list[Values], needed: set[str]) -> None:
    """Run the steps of one text through a slice; what no later slice needs is dropped from ``steps``."""
    presents = [present for _, present in part.states]
    states: Values = {}
    for past, (token, known) in enumerate(zip(ids, steps, strict=True)):
        given = {name: known[name] for name in part.inputs} | states
        found = session.run([*part.outputs, *presents], [token], given, past)
        made = dict(zip([*part.outputs, *presents], found, strict=True))
        states = {before: made[behind] for before, behind in part.states}
        steps[past] = {name: value for name, value in {**known, **made}.items() if name in needed}
