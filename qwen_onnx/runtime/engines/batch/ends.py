"""What a head for multi-token prediction shares with its model: the embedding before it, the model's head behind it.

Both are read out of the decoder's graph. The table is mapped, as the decoder maps it. Of the model's head the rows of
the commonest tokens are enough to guess with, and cost a quarter of the time and of the memory: a tokenizer that merges
pairs numbers its tokens by how early they were merged, which is by how common they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qwen_onnx.artifact.folded import Folded
from qwen_onnx.artifact.stored import Array, stored_array
from qwen_onnx.errors import ArtifactError
from qwen_onnx.runtime.engines.batch.head import HEADS, pruned_head
from qwen_onnx.runtime.engines.batch.layout import Floats
from qwen_onnx.runtime.engines.batch.rewritten import rewritten
from qwen_onnx.runtime.engines.batch.session import open_session

IDS, LOGITS = "input_ids", "logits"
# what the values are called here between embedding, decoder and head
HIDDEN, EMBEDDED = "hidden_states", "token_embeddings"
LOOKUPS = ("Gather", "GatherBlockQuantized")
# tokens that are guessed: of Qwen's first tokenizer they are 97 % of English and of code, 74 % of many languages
COMMON = 1 << 16


def with_hidden(graph: Any) -> bool:
    """Let the graph give the hidden states of all positions besides; false: it has no head that we know."""
    found = _head(graph)
    if found is None:
        return False
    _rename(graph, found[1], HIDDEN)
    graph.output.append(_value(HIDDEN))
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
    _keep(graph, _value(EMBEDDED))
    return True


class Table:
    """The embedding of the decoder in the file ``graph``.

    Raises:
        ArtifactError: it has none that stands alone, or it does not load.
    """

    def __init__(self, graph: Path, threads: int | None) -> None:
        def part(file: Path) -> bytes | None:
            return rewritten(file, [only_embedding])

        self._session = open_session(graph, threads, part, called="the embedding", taking_turns=True)
        if [entry.name for entry in self._session.get_outputs()] != [EMBEDDED]:
            raise _unfit("its decoder has no embedding that stands alone", graph)

    def embed(self, ids: Array) -> Floats:
        """Embeddings [n, t, width] of ids [n, t]."""
        found: Floats = self._session.run([EMBEDDED], {IDS: ids})[0]
        return found


class CommonHead:
    """The rows of the ``COMMON`` first tokens of the head of the decoder in the file ``graph``.

    Raises:
        ArtifactError: it has none that we know, or it does not load.
    """

    def __init__(self, graph: Path, threads: int | None) -> None:
        self._session = open_session(graph, threads, _common_head, called="the model's head", taking_turns=True)

    def likeliest(self, hidden: Floats) -> int:
        """The token whose logit is the largest, of one hidden state [width]."""
        (logits,) = self._session.run([LOGITS], {HIDDEN: hidden[None]})
        return int(logits.argmax())


def _common_head(file: Path) -> bytes:
    """A graph that makes logits [n, tokens] of hidden states [n, width], its weights within."""
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    found = _head(model.graph)
    if found is None:
        raise _unfit("its decoder has no head that stands alone", file)
    head, folded = found[0], Folded(model, file, ArtifactError)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}

    def constant(name: str) -> Array:
        def read(part: str) -> Array:
            return stored_array(stored[part], file, ArtifactError)

        return folded.value(name, read) if name in folded else read(name)

    if not all(name in folded or name in stored for name in head.input[1:] if name):
        raise _unfit("the weights of its decoder's head are not constant", file)
    head.input[0] = HIDDEN
    weights = {name: constant(name) for name in head.input[1:] if name}
    if head.op_type == "MatMul":
        weights = {name: weight[:, :COMMON] for name, weight in weights.items()}
    else:
        rows = next(item.i for item in head.attribute if item.name == "N")
        # scales and zero points may be flat
        weights = {name: weight.reshape(rows, -1)[:COMMON] for name, weight in weights.items()}
        codes = weights[head.input[1]]
        blocks = weights[head.input[2]].shape[1]
        weights[head.input[1]] = codes.reshape(len(codes), blocks, -1)
        next(item for item in head.attribute if item.name == "N").i = len(codes)
    tensors = [onnx.numpy_helper.from_array(np.ascontiguousarray(weight), name) for name, weight in weights.items()]
    graph = onnx.helper.make_graph([head], "head", [_value(HIDDEN)], [_value(LOGITS)], tensors)
    alone = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    serialized: bytes = alone.SerializeToString()
    return serialized


def _unfit(what: str, file: Path) -> ArtifactError:
    hint = "get the artifact again, or build it"
    return ArtifactError(f"no head for multi-token prediction fits this model: {what}", where=str(file), hint=hint)


def _value(name: str) -> Any:
    import onnx

    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)


def _head(graph: Any) -> tuple[Any, str] | None:
    """The head's node, and the name of what it reads, for all positions."""
    found = pruned_head(graph)
    if found is not None:
        return found[1], str(found[0].input[0])
    head = next((node for node in graph.node if LOGITS in node.output), None)
    return (head, str(head.input[0])) if head is not None and head.op_type in HEADS else None


def _rename(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def _keep(graph: Any, output: Any) -> None:
    """Leave what makes ``output``."""
    makers = {name: node for node in graph.node for name in node.output}
    names: set[str] = set()
    waiting = [output.name]
    while waiting:
        name = waiting.pop()
        if name and name not in names:
            names.add(name)
            waiting += makers[name].input if name in makers else ()
    for field, kept in (
        (graph.node, [node for node in graph.node if names & set(node.output)]),
        (graph.initializer, [item for item in graph.initializer if item.name in names]),
        (graph.input, [entry for entry in graph.input if entry.name in names]),
        (graph.output, [output]),
        (graph.value_info, []),
    ):
        del field[:]
        field.extend(kept)
