"""``embedding.onnx``, the part that every decoder of a model that sees or hears has beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from qwen_onnx.artifact.genai_config import GENAI_CONFIG
from qwen_onnx.catalog.architectures import text_config
from qwen_onnx.errors import ExportError
from qwen_onnx.export.drawing import INT64, Drawing
from qwen_onnx.export.passes.pack_weights.data_file import DataFile
from qwen_onnx.export.weights import CheckpointWeights
from qwen_onnx.sources.checkpoint import read_json

CHECKPOINT = "checkpoint"  # of the build, in the folder that Olive runs in
EMBEDDING_FILE = "embedding.onnx"
IDS, EMBEDDED = "input_ids", "inputs_embeds"
TABLE = "model.embed_tokens.weight"


def copy_decoder(decoder: Path, output: Path) -> None:
    """All files of ``decoder`` but genai's configuration."""
    output.mkdir(parents=True, exist_ok=True)
    for path in sorted(decoder.iterdir()):
        if path.is_file() and path.name != GENAI_CONFIG:
            # a link would do, but onnx loads no weights that have two names
            shutil.copyfile(path, output / path.name)


def embedded_kind(decoder: Path) -> int:
    """The type in which a decoder takes embeddings, of onnx.TensorProto.DataType.

    Raises:
        ExportError: it takes token ids.
    """
    import onnx

    config = read_json(decoder / GENAI_CONFIG)
    file = decoder / str(config["model"]["decoder"]["filename"])
    graph = onnx.load(str(file), load_external_data=False).graph
    kinds = [entry.type.tensor_type.elem_type for entry in graph.input if entry.name == EMBEDDED]
    if not kinds:
        raise ExportError("the decoder takes token ids, not embeddings", where=str(file))
    return int(kinds[0])


def write_embedding(
    checkpoint: Path, output: Path, *, features: str, token: int, hidden: int, width: int, kind: int
) -> None:
    """Rows of the table, and where ``token`` stands for a part of a medium, the next of the features.

    Args:
        kind: type of features and embeddings, see ``embedded_kind``.
        features: name of the input that has them.
        hidden: dimensions of the table; width: of the features. With DeepStack every row has room behind it for what
            layers add: zeros but for pictures.
    """
    vocabulary = text_config(read_json(checkpoint / "config.json"))["vocab_size"]
    with DataFile(output / f"{EMBEDDING_FILE}.data") as data:
        draw = Drawing(CheckpointWeights(checkpoint, plain=True), data)
        table, stored = draw.table(TABLE, (vocabulary, hidden))
        rows = draw.node("Gather", table, IDS, axis=0)
        rows = rows if stored == kind else draw.node("Cast", rows, to=kind)
        if width > hidden:
            rows = draw.node("Pad", rows, draw.integer([0, 0, 0, 0, 0, width - hidden]))
        places = draw.node("NonZero", draw.node("Equal", IDS, draw.integer(token)))
        indices = draw.node("Transpose", places, perm=[1, 0])
        count = draw.node("Shape", indices, start=0, end=1)
        # while genai decodes, it hands over the prompt's features although no token asks for one
        used = draw.node("Slice", features, draw.integer([0]), count, draw.integer([0]))
        draw.node("ScatterND", rows, indices, used)
        draw.nodes[-1].output[0] = EMBEDDED
        tokens: list[str | int] = ["batch_size", "sequence_length"]
        draw.save(
            output / EMBEDDING_FILE,
            [(IDS, INT64, tokens), (features, kind, ["num_tokens", width])],
            [(EMBEDDED, kind, [*tokens, width])],
        )


def configure(decoder: Path, output: Path, *, features: str, width: int, told: dict[str, Any]) -> None:
    """Write ``genai_config.json``: that of ``decoder`` with the embedding, and what ``told`` says of the model."""
    config: dict[str, Any] = read_json(decoder / GENAI_CONFIG)
    model = config["model"]
    embedding = {
        "filename": EMBEDDING_FILE,
        "inputs": {IDS: IDS, features: features},
        "outputs": {EMBEDDED: EMBEDDED},
    }
    model |= {"embedding": embedding, **told}
    # of what the decoder takes, which genai makes room for
    model["decoder"]["hidden_size"] = width
    (output / GENAI_CONFIG).write_text(json.dumps(config, indent=4), encoding="utf-8")
