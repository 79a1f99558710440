"""Checks of an artifact that sees: its encoder, its preparation of pictures, and what they do to its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qwen_onnx.artifact.processor_config import ImageSettings
from qwen_onnx.artifact.video_config import VideoSettings
from qwen_onnx.records import Verdict
from qwen_onnx.runtime.engines.batch.sight import Sight
from qwen_onnx.runtime.engines.media import Picture
from qwen_onnx.sources.checkpoint import read_json
from qwen_onnx.sources.vision_config import PREPROCESSOR
from qwen_onnx.verify import clips, drawn, senses
from qwen_onnx.verify.checks import GRAPH, check
from qwen_onnx.verify.context import Context
from qwen_onnx.verify.records import CheckResult
from qwen_onnx.verify.results import certain
from qwen_onnx.verify.statistics import at_most

# made of artifacts that see alone
VISUAL = frozenset({"processing", "vision", "sight_parity", "sight"})
PATCH_DIFF = 1e-5
SEVERAL, CLIP = "several", "clip"
WORDS = "The picture shows several things. From left to right they differ in colour, in size and in what they mean."


def sees(artifact: Path) -> bool:
    """Whether an artifact has an encoder of pictures."""
    model = senses.model_of(artifact)
    return model is not None and model.vision is not None


def _pictures(artifact: Path) -> dict[str, Picture]:
    from qwen_onnx.runtime.processing.images import prepare

    settings = ImageSettings.read(artifact)
    return {kind: prepare(image, settings, where=kind) for kind, image in drawn.pictures().items()}


def _clip(artifact: Path) -> tuple[Picture, ...]:
    """Its pairs of frames; none, if the artifact does not say how videos are prepared."""
    from qwen_onnx.runtime.processing.clips import open_clip, prepare_clip

    settings = VideoSettings.read(artifact)
    if settings is None:
        return ()
    clip = open_clip(tuple(map(_file, drawn.clip())), None, where=CLIP)
    return prepare_clip(clip, ImageSettings.read(artifact), settings)


@check("processing", GRAPH)
def processing_parity(context: Context) -> CheckResult:
    """Patches and grids are those of transformers' slow processor with the checkpoint's own settings.

    Those of a clip, too, if the artifact takes videos.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    told = read_json(context.checkpoint / PREPROCESSOR)
    processor = Qwen2VLImageProcessorPil(**{name: told[name] for name in told if not name.endswith("_type")})
    worst_diff, grids = 0.0, 0
    images = drawn.pictures()
    for kind, picture in _pictures(context.artifact).items():
        wanted = processor(images=[images[kind]], return_tensors="np")
        if wanted["image_grid_thw"].tolist() != [list(picture.grid)]:
            grids += 1
            continue
        worst_diff = max(worst_diff, float(np.abs(wanted["pixel_values"] - picture.pixels).max()))
    clip = _clip(context.artifact)
    if clip:
        wanted_clip, found = clips.reference(context.checkpoint, drawn.clip()), [one.pixels for one in clip]
        if [len(part) for part in found] == [len(part) for part in wanted_clip]:
            worst_diff = max(worst_diff, *(float(np.abs(a - b).max()) for a, b in zip(found, wanted_clip, strict=True)))
        else:
            grids += 1
    verdict = Verdict.FAIL if grids else at_most(certain(worst_diff), PATCH_DIFF)
    return CheckResult(
        name="processing",
        verdict=verdict,
        measured={"pictures": len(images), "videos": int(bool(clip)), "max_diff": worst_diff, "other_grids": grids},
        limit={"max_diff": PATCH_DIFF, "other_grids": 0},
    )


@check("vision", GRAPH)
def encoder_parity(context: Context) -> CheckResult:
    """The encoder gives the features that PyTorch's tower gives in fp32, and what DeepStack adds."""
    pictures = [*_pictures(context.artifact).values(), *_clip(context.artifact)]
    form = context.tower.form
    return senses.encoder_parity(context, "vision", Sight, pictures, form.features // form.output)


@check("sight_parity", GRAPH)
def graph_parity_with_pictures(context: Context) -> CheckResult:
    """With a picture's features the graph computes what PyTorch computes with the same matrices, both in fp32.

    Where pictures stand and what each layer gets of them is then right whatever the quantisation costs.
    """
    return senses.graph_parity(context, "sight_parity", _prompts(context)[SEVERAL])


@check("sight", GRAPH)
def drift_with_pictures(context: Context) -> CheckResult:
    """Teacher-forced on conversations with pictures, the artifact predicts what PyTorch predicts."""
    return senses.drift(context, "sight", _prompts(context))


def _prompts(context: Context) -> dict[str, senses.Asked]:
    """By kind of picture: a conversation about it, and one about several of them; with a clip if it takes videos."""

    def made() -> dict[str, senses.Asked]:
        images = drawn.pictures()
        turns = {**{kind: [kind] for kind in images}, SEVERAL: list(images)[:2]}
        files: dict[str, bytes | tuple[bytes, ...]] = {kind: _file(image) for kind, image in images.items()}
        if senses.watches(context):
            files[CLIP] = tuple(map(_file, drawn.clip()))
            turns |= {CLIP: [CLIP], SEVERAL: [*turns[SEVERAL], CLIP]}
        return senses.asked_of(context, turns, files, WORDS)

    return context.once("pictures", made)


def _file(image: Any) -> bytes:
    import io

    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
