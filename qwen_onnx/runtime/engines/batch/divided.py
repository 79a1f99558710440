"""A graph in three parts: what embeds token ids, what makes hidden states of that, and what makes logits of those.

A head for multi-token prediction has the model's own embedding before it and the model's head behind it. Loaded as
parts, neither is in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qwen_onnx.runtime.engines.batch.head import HEADS, pruned_head
from qwen_onnx.runtime.engines.batch.layout import Floats, UnsupportedGraphError
from qwen_onnx.runtime.engines.batch.rewritten import rewritten
from qwen_onnx.runtime.engines.batch.session import open_session

IDS, LOGITS = "input_ids", "logits"
# what the parts call the values between them
HIDDEN, EMBEDDED = "hidden_states", "token_embeddings"
LOOKUPS = ("Gather", "GatherBlockQuantized")
Array = np.ndarray[Any, Any]


def without_head(graph: Any) -> bool:
    """Let the graph give the hidden states of all positions, in place of logits; false: it has no such head."""
    hidden = _hidden(graph)
    if hidden is None:
        return False
    outputs = [output for output in graph.output if output.name != LOGITS]
    _rename(graph, hidden, HIDDEN)
    _keep(graph, [*outputs, _value(HIDDEN)], [])
    return True


def only_head(graph: Any) -> bool:
    """Let the graph make logits of the hidden states that it is given; false: it has no such head."""
    hidden = _hidden(graph)
    if hidden is None:
        return False
    found = pruned_head(graph)
    if found is not None:
        found[1].input[0] = hidden
    _rename(graph, hidden, HIDDEN)
    logits = next(output for output in graph.output if output.name == LOGITS)
    logits.type.tensor_type.shape.dim[1].dim_param = "positions"
    _keep(graph, [logits], [_value(HIDDEN)])
    return True


def only_embedding(graph: Any) -> bool:
    """Let the graph give the rows of its table for the ids that it is given; false: it takes no ids."""
    table = next((node for node in graph.node if node.op_type in LOOKUPS and IDS in node.input), None)
    if table is None:
        return False
    name = table.output[0]
    readers = [node for node in graph.node if name in node.input]
    if [node.op_type for node in readers] == ["Cast"]:
        name = readers[0].output[0]
    _rename(graph, name, EMBEDDED)
    _keep(graph, [_value(EMBEDDED)], [entry for entry in graph.input if entry.name == IDS])
    return True


class Table:
    """The embedding of an artifact's graph.

    Raises:
        UnsupportedGraphError: it has none that stands alone. ArtifactError: it does not load.
    """

    def __init__(self, graph: Path, threads: int | None) -> None:
        self._session = part_of(graph, threads, only_embedding, "the model's embedding")

    def embed(self, ids: Array) -> Floats:
        """Embeddings [n, t, width] of ids [n, t]."""
        found: Floats = self._session.run([EMBEDDED], {IDS: ids})[0]
        return found


class Head:
    """The head of an artifact's graph.

    Raises:
        UnsupportedGraphError: it has none that stands alone. ArtifactError: it does not load.
    """

    def __init__(self, graph: Path, threads: int | None) -> None:
        self._session = part_of(graph, threads, only_head, "the model's head")
        [self.entry] = self._session.get_outputs()

    def logits(self, hidden: Floats, into: Array) -> None:
        """Logits of ``hidden`` [n, t, width], written ``into`` [n, t, vocabulary]."""
        binding = self._session.io_binding()
        binding.bind_cpu_input(HIDDEN, np.ascontiguousarray(hidden))
        binding.bind_output(LOGITS, "cpu", 0, into.dtype.type, into.shape, into.ctypes.data)
        self._session.run_with_iobinding(binding)

    def likeliest(self, hidden: Floats) -> int:
        """The token whose logit is the largest, of one hidden state [width]."""
        (logits,) = self._session.run([LOGITS], {HIDDEN: np.ascontiguousarray(hidden[None, None])})
        return int(logits.argmax())


def part_of(graph: Path, threads: int | None, change: Callable[[Any], bool], called: str) -> Any:
    """A session of a part of a graph.

    Raises:
        UnsupportedGraphError: there is no such part. ArtifactError: it does not load.
    """

    def part(file: Path) -> bytes | None:
        found = rewritten(file, [change])
        if found is None:
            raise UnsupportedGraphError(f"{called} does not stand alone in the graph", where=str(file))
        return found

    return open_session(graph, threads, part, called=called, taking_turns=True)


def _value(name: str) -> Any:
    import onnx

    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)


def _hidden(graph: Any) -> str | None:
    """Name of what the head reads, for all positions."""
    found = pruned_head(graph)
    if found is not None:
        return str(found[0].input[0])
    head = next((node for node in graph.node if LOGITS in node.output), None)
    return str(head.input[0]) if head is not None and head.op_type in HEADS else None


def _rename(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def _keep(graph: Any, outputs: list[Any], given: list[Any]) -> None:
    """Leave what makes ``outputs`` of ``given``, and the other inputs that this needs."""
    makers = {name: node for node in graph.node for name in node.output}
    told, names = {entry.name for entry in given}, set()
    waiting = [entry.name for entry in outputs]
    while waiting:
        name = waiting.pop()
        if name and name not in names:
            names.add(name)
            waiting += makers[name].input if name in makers and name not in told else ()
    ends = {name for name in names if name in makers and name not in told}
    inputs = [entry for entry in graph.input if entry.name in names - told]
    for field, kept in (
        (graph.node, [node for node in graph.node if ends & set(node.output)]),
        (graph.initializer, [item for item in graph.initializer if item.name in names]),
        (graph.input, [*given, *inputs]),
        (graph.output, outputs),
        (graph.value_info, []),
    ):
        copies = list(kept)
        del field[:]
        field.extend(copies)
