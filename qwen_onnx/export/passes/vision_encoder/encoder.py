"""Our Olive pass ``VisionEncoder``: the parts of a model that sees, beside its decoder, as onnxruntime-genai has them.

``vision.onnx`` makes features of one picture, ``embedding.onnx`` puts them between the embeddings of the tokens,
``processor_config.json`` says how a picture becomes patches. Their weights are the checkpoint's, in its own type.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from qwen_onnx.artifact.genai_config import GENAI_CONFIG
from qwen_onnx.artifact.processor_config import PROCESSOR_CONFIG, ImageSettings
from qwen_onnx.errors import ExportError
from qwen_onnx.export.options import parameters
from qwen_onnx.export.passes.pack_weights.data_file import DataFile
from qwen_onnx.export.passes.vision_encoder.drawing import FLOAT, INT64, Drawing
from qwen_onnx.export.passes.vision_encoder.options import VisionEncoderOptions
from qwen_onnx.export.passes.vision_encoder.tower import FEATURES, GRID, PIXELS, draw_tower, inputs, outputs
from qwen_onnx.export.progress import progress
from qwen_onnx.export.weights import CheckpointWeights
from qwen_onnx.sources.checkpoint import read_json
from qwen_onnx.sources.vision_config import (
    QWEN2_5_VL,
    QWEN2_VL,
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_VL,
    QWEN3_VL_MOE,
    VISION_CONFIG,
    Tower,
    preparation_of,
    tower_of,
)

CHECKPOINT = "checkpoint"  # of the build, in the folder that Olive runs in
VISION_FILE, EMBEDDING_FILE = "vision.onnx", "embedding.onnx"
IDS, EMBEDDED = "input_ids", "inputs_embeds"
TABLE = "model.embed_tokens.weight"
# genai's names; Qwen2-VL's positions of pictures are those of Qwen2.5-VL
GENAI_TYPES = {
    QWEN2_VL: "qwen2_5_vl",
    QWEN2_5_VL: "qwen2_5_vl",
    QWEN3_VL: "qwen3_vl",
    QWEN3_VL_MOE: "qwen3_vl",
    QWEN3_5: "qwen3_5",
    QWEN3_5_MOE: "qwen3_5_moe",
}
# and those of the preparation of pictures
PREPARED_AS = GENAI_TYPES | {QWEN3_5: "qwen3_vl", QWEN3_5_MOE: "qwen3_vl"}
SECONDS = 2.0


class VisionEncoder(Pass):  # type: ignore[misc]
    """Write encoder, embedding and preparation of pictures beside a decoder."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return parameters(VisionEncoderOptions)

    def _run_for_config(
        self, model: ONNXModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        source = Path(model.model_path)
        write_parts(Path(CHECKPOINT).resolve(), source.parent, Path(output_model_path))
        return ONNXModelHandler(output_model_path, onnx_file_name=source.name)


def write_parts(checkpoint: Path, decoder: Path, output: Path) -> None:
    """The files of ``decoder`` and the parts that see, in ``output``.

    Args:
        checkpoint: as ``write_text_form`` writes it.

    Raises:
        ExportError: there is no tower, a weight is missing or has another shape, or the decoder takes token ids.
        UnsupportedModelError: see ``tower_of`` and ``preparation_of``.
    """
    if not (checkpoint / VISION_CONFIG).exists():
        raise ExportError("the checkpoint has no vision tower", where=str(checkpoint), hint="qwen-onnx list")
    settings = read_json(checkpoint / VISION_CONFIG)
    tower = tower_of(settings, str(checkpoint / VISION_CONFIG))
    weights = CheckpointWeights(checkpoint, plain=True)
    output.mkdir(parents=True, exist_ok=True)
    for path in sorted(decoder.iterdir()):
        if path.is_file() and path.name != GENAI_CONFIG:
            # a link would do, but onnx loads no weights that have two names
            shutil.copyfile(path, output / path.name)
    progress(f"writing the vision encoder: {tower.depth} layers of {tower.width}")
    with DataFile(output / f"{VISION_FILE}.data") as data:
        draw = Drawing(weights, data)
        draw_tower(draw, tower)
        draw.save(output / VISION_FILE, inputs(tower), outputs(tower))
    config = read_json(checkpoint / "config.json")
    vocabulary = (config.get("text_config") or config)["vocab_size"]
    with DataFile(output / f"{EMBEDDING_FILE}.data") as data:
        _embedding(Drawing(weights, data), tower, vocabulary, output / EMBEDDING_FILE)
    preparation = preparation_of(checkpoint, tower)
    images = ImageSettings(
        min_pixels=preparation.min_pixels,
        max_pixels=preparation.max_pixels,
        patch_size=tower.patch,
        temporal_patch_size=tower.temporal_patch,
        merge_size=tower.merge,
        mean=preparation.mean,
        std=preparation.std,
    )
    told = json.dumps(images.config(PREPARED_AS[tower.architecture]), indent=1)
    (output / PROCESSOR_CONFIG).write_text(told, encoding="utf-8")
    _configure(decoder / GENAI_CONFIG, output / GENAI_CONFIG, tower)


def _embedding(draw: Drawing, tower: Tower, vocabulary: int, path: Path) -> None:
    """Rows of the table, and where a token stands for a part of a picture, the next of the features.

    With DeepStack every row has room behind it for what layers add: zeros but for pictures.
    """
    table, kind = draw.table(TABLE, (vocabulary, tower.output))
    rows = draw.node("Gather", table, IDS, axis=0)
    rows = rows if kind == FLOAT else draw.node("Cast", rows, to=FLOAT)
    if tower.deepstack:
        rows = draw.node("Pad", rows, draw.integer([0, 0, 0, 0, 0, tower.features - tower.output]))
    places = draw.node("NonZero", draw.node("Equal", IDS, draw.integer(tower.image_token)))
    indices = draw.node("Transpose", places, perm=[1, 0])
    count = draw.node("Shape", indices, start=0, end=1)
    # while genai decodes, it hands over the prompt's features although no token asks for one
    used = draw.node("Slice", FEATURES, draw.integer([0]), count, draw.integer([0]))
    draw.node("ScatterND", rows, indices, used)
    draw.nodes[-1].output[0] = EMBEDDED
    tokens: list[str | int] = ["batch_size", "sequence_length"]
    draw.save(
        path,
        [(IDS, INT64, tokens), (FEATURES, FLOAT, ["num_tokens", tower.features])],
        [(EMBEDDED, FLOAT, [*tokens, tower.features])],
    )


def _configure(source: Path, target: Path, tower: Tower) -> None:
    config: dict[str, Any] = read_json(source)
    model = config["model"]
    if EMBEDDED not in model["decoder"]["inputs"]:
        raise ExportError("the decoder takes token ids, not embeddings", where=str(source))
    model |= {
        "type": GENAI_TYPES[tower.architecture],
        "image_token_id": tower.image_token,
        "video_token_id": tower.video_token,
        "vision_start_token_id": tower.vision_start,
        "embedding": {
            "filename": EMBEDDING_FILE,
            "inputs": {IDS: IDS, FEATURES: FEATURES},
            "outputs": {EMBEDDED: EMBEDDED},
        },
        "vision": {
            "filename": VISION_FILE,
            "config_filename": PROCESSOR_CONFIG,
            "spatial_merge_size": tower.merge,
            "patch_size": tower.patch,
            "tokens_per_second": SECONDS,
            "window_size": tower.window * tower.merge * tower.patch,
            "inputs": {PIXELS: PIXELS, GRID: GRID},
            "outputs": {FEATURES: FEATURES},
        },
    }
    # of what the decoder takes, which genai makes room for
    model["decoder"]["hidden_size"] = tower.features
    target.write_text(json.dumps(config, indent=4), encoding="utf-8")
