"""Parts beside a decoder that hand over float32 where they are built to hand over float16."""

from __future__ import annotations

from pathlib import Path

from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.artifact.stored import FLOAT, FLOAT16
from qwen_onnx.errors import VerificationError


def widened_parts(folder: Path) -> dict[str, bytes]:
    """By file, those of an artifact's encoder and embedding that hand over float16, for a decoder widened to float32.

    What they compute is rounded to float16 as ever, so that only the decoder's arithmetic differs.
    """
    model = GenaiConfig.read(folder, VerificationError).model
    parts = [part.filename for part in (model.embedding, model.vision, model.speech) if part is not None]
    found = {name: _widened(folder / name) for name in parts}
    return {name: content for name, content in found.items() if content}


def _widened(file: Path) -> bytes:
    """The graph; nothing where no end of it is float16."""
    import onnx
    from onnx import helper

    model = onnx.load(str(file), load_external_data=False)
    graph = model.graph
    ends = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}
    half = [name for name, end in ends.items() if end.elem_type == FLOAT16]
    if not half:
        return b""
    inner = {name: f"{name}/half" for name in half}
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [inner.get(name, name) for name in names]
    for name in half:
        ends[name].elem_type = FLOAT
    given = {value.name for value in graph.input}
    first = [helper.make_node("Cast", [name], [inner[name]], to=FLOAT16) for name in half if name in given]
    last = [helper.make_node("Cast", [inner[name]], [name], to=FLOAT) for name in half if name not in given]
    nodes = [*first, *graph.node, *last]
    del graph.node[:]
    graph.node.extend(nodes)
    content: bytes = model.SerializeToString()
    return content
