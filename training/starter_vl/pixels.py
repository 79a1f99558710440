"""Pictures for the tower, prepared by what prepares them in the server."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qwen_onnx.artifact.processor_config import ImageSettings
from qwen_onnx.runtime.processing.images import prepare
from training.starter_vl.scenes import Scene, draw
from training.starter_vl.tower import CHANNELS, FRAMES, MERGE, PATCH

# a square of any size becomes one of GRID tokens a side: smart_resize rounds, so there is room on both sides of 84²
LEAST, MOST = 6800, 7400
MIDDLE = (0.5, 0.5, 0.5)
SETTINGS = ImageSettings(
    min_pixels=LEAST,
    max_pixels=MOST,
    patch_size=PATCH,
    temporal_patch_size=FRAMES,
    merge_size=MERGE,
    mean=MIDDLE,
    std=MIDDLE,
)


def one_frame(image: Image.Image) -> np.ndarray:
    """[patches, channels · patch²]."""
    pixels = prepare(image, SETTINGS, where="training").pixels
    parts = pixels.reshape(len(pixels), CHANNELS, FRAMES, PATCH * PATCH)
    return np.ascontiguousarray(parts[:, :, 0]).reshape(len(pixels), -1)


def batch(scenes: Sequence[Scene], sides: Sequence[int], fonts: Sequence[str]) -> Tensor:
    """[pictures, patches, channels · patch²]."""
    drawn = [one_frame(draw(shown, side, fonts)) for shown, side in zip(scenes, sides, strict=True)]
    return torch.from_numpy(np.stack(drawn))
