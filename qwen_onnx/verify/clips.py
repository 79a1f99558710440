"""A clip as transformers prepares it, frame by frame: its video processors need torchvision, its slow one does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_onnx.sources.checkpoint import read_json
from qwen_onnx.sources.video_preparation import VIDEO_PREPROCESSOR, bounds_of
from qwen_onnx.sources.vision_config import PREPROCESSOR, VISION_CONFIG, tower_of

if TYPE_CHECKING:
    from PIL.Image import Image

Floats = np.ndarray[Any, np.dtype[np.float32]]


def reference(checkpoint: Path, frames: Sequence[Image]) -> list[Floats]:
    """Patches of each patch in time, float32 [patches, channels · temporal_patch_size · patch_size²].

    Sizes are those of transformers' functions, pixels those of its slow processor of pictures, which puts each frame
    into every place in time of a patch: of these, each frame gives its own.
    """
    from PIL.Image import Resampling
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_of_all

    tower = tower_of(read_json(checkpoint / VISION_CONFIG), str(checkpoint / VISION_CONFIG))
    name = VIDEO_PREPROCESSOR if (checkpoint / VIDEO_PREPROCESSOR).exists() else PREPROCESSOR
    told, group, factor = read_json(checkpoint / name), tower.temporal_patch, tower.patch * tower.merge
    least, most = bounds_of(told, tower.style.time)
    width, height = frames[0].size
    if tower.style.time == "timestamps":
        size = smart_resize_of_all(len(frames), height, width, group, factor, least, most)
    else:
        size = smart_resize(height, width, factor, least, most)
    kept = {key: told[key] for key in ("image_mean", "image_std") if key in told}
    processor = Qwen2VLImageProcessorPil(
        do_resize=False, patch_size=tower.patch, merge_size=tower.merge, temporal_patch_size=group, **kept
    )
    resized = [frame.resize((size[1], size[0]), Resampling.BICUBIC) for frame in frames]
    resized += resized[-1:] * (-len(resized) % group)
    found = [processor(images=[frame], return_tensors="np")["pixel_values"] for frame in resized]
    shape = (-1, 3, group, tower.patch, tower.patch)
    slots = [values.reshape(shape)[:, :, 0] for values in found]
    return [np.stack(slots[at : at + group], axis=2).reshape(len(slots[at]), -1) for at in range(0, len(slots), group)]
