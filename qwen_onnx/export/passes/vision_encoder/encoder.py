"""Our Olive pass ``VisionEncoder``: the parts of a model that sees, beside its decoder, as onnxruntime-genai has them.

``vision.onnx`` makes features of one picture, ``embedding.onnx`` puts them between the embeddings of the tokens,
``processor_config.json`` says how a picture becomes patches, ``video_config.json`` how a video does. Their weights are
the checkpoint's, in its own type unless the encoder's are told to have 8 bits; features and embeddings have the type
that the decoder takes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_onnx.artifact.processor_config import PROCESSOR_CONFIG, ImageSettings
from qwen_onnx.artifact.video_config import VIDEO_CONFIG
from qwen_onnx.errors import ExportError
from qwen_onnx.export.drawing import Drawing
from qwen_onnx.export.embedding import configure, copy_decoder, embedded_kind, write_embedding
from qwen_onnx.export.passes.pack_weights.data_file import DataFile
from qwen_onnx.export.passes.vision_encoder.options import VisionEncoderOptions
from qwen_onnx.export.passes.vision_encoder.tower import FEATURES, GRID, PIXELS, draw_tower, inputs, outputs
from qwen_onnx.export.progress import progress
from qwen_onnx.export.tower_pass import TowerPass
from qwen_onnx.export.weights import CheckpointWeights
from qwen_onnx.sources.checkpoint import read_json
from qwen_onnx.sources.video_preparation import video_preparation_of
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

VISION_FILE = "vision.onnx"
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


def write_parts(checkpoint: Path, decoder: Path, output: Path, bits: int | None = None) -> None:
    """The files of ``decoder`` and the parts that see, in ``output``.

    Args:
        checkpoint: as ``write_text_form`` writes it.
        bits: of the weights of the encoder's layers; None: the checkpoint's own type.

    Raises:
        ExportError: there is no tower, a weight is missing or has another shape, or the decoder takes token ids.
        UnsupportedModelError: see ``tower_of``, ``preparation_of`` and ``video_preparation_of``.
    """
    if not (checkpoint / VISION_CONFIG).exists():
        raise ExportError("the checkpoint has no vision tower", where=str(checkpoint), hint="qwen-onnx list")
    settings = read_json(checkpoint / VISION_CONFIG)
    tower = tower_of(settings, str(checkpoint / VISION_CONFIG))
    kind = embedded_kind(decoder)
    copy_decoder(decoder, output)
    progress(f"writing the vision encoder: {tower.depth} layers of {tower.width}")
    with DataFile(output / f"{VISION_FILE}.data") as data:
        draw = Drawing(CheckpointWeights(checkpoint, plain=True), data, bits)
        draw_tower(draw, tower, kind)
        draw.save(output / VISION_FILE, inputs(tower), outputs(tower, kind))
    write_embedding(
        checkpoint,
        output,
        features=FEATURES,
        token=tower.image_token,
        hidden=tower.output,
        width=tower.features,
        kind=kind,
    )
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
    if videos := video_preparation_of(checkpoint, tower):
        (output / VIDEO_CONFIG).write_text(videos.model_dump_json(indent=1, exclude_none=True), encoding="utf-8")
    configure(decoder, output, features=FEATURES, width=tower.features, told=_section(tower))


def _section(tower: Tower) -> dict[str, Any]:
    """What ``genai_config.json`` says of a model that sees."""
    return {
        "type": GENAI_TYPES[tower.architecture],
        "image_token_id": tower.image_token,
        "video_token_id": tower.video_token,
        "vision_start_token_id": tower.vision_start,
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


class VisionEncoder(TowerPass):
    """Write encoder, embedding and preparation of pictures beside a decoder."""

    kind = VisionEncoderOptions
    write = staticmethod(write_parts)
