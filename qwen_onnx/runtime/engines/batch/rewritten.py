"""A graph that is changed while it is loaded; its weights stay in the files beside it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

# the weights lie beside the graph; a file of this size holds them itself, and is left as it is
MOST_BYTES = 256 << 20


def rewritten(model: Path, changes: Sequence[Callable[[Any], bool]]) -> bytes | None:
    """The graph in ``model`` with ``changes``, each of which says whether it changed anything.

    Returns:
        The graph without its weights; None where nothing changed.
    """
    import onnx

    if model.stat().st_size > MOST_BYTES:
        return None
    loaded = onnx.load(str(model), load_external_data=False)
    changed = [change(loaded.graph) for change in changes]
    if not any(changed):
        return None
    serialized: bytes = loaded.SerializeToString()
    return serialized


def without_slots(graph: Any, filled: Collection[str] = ()) -> bool:
    """Take out the slots for adapters that nobody fills: their empty products take 9 % of a step.

    A slot is ``base + (x A) B``, where A and B are inputs that have a value of their own, of rank 0.

    Args:
        filled: names of inputs whose slots stay.
    """
    inputs = {entry.name for entry in graph.input} - set(filled)
    empty = {item.name for item in graph.initializer if item.name in inputs and 0 in item.dims}
    makers = {name: node for node in graph.node for name in node.output}
    gone: list[Any] = []
    for add in graph.node:
        up = makers.get(add.input[1]) if add.op_type == "Add" else None
        if up is None or up.op_type != "MatMul" or up.input[1] not in empty:
            continue
        down, base = makers[up.input[0]], makers[add.input[0]]
        base.output[list(base.output).index(add.input[0])] = add.output[0]
        gone += [down, up, add]
    if not gone:
        return False
    away = {node.name for node in gone}
    for field, kept in (
        (graph.node, [node for node in graph.node if node.name not in away]),
        (graph.input, [entry for entry in graph.input if entry.name not in empty]),
        (graph.initializer, [item for item in graph.initializer if item.name not in empty]),
    ):
        del field[:]
        field.extend(kept)
    return True
