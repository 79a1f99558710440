"""Options of ``AudioEncoder``."""

from __future__ import annotations

from typing import ClassVar

from qwen_onnx.catalog.architectures import HEARING
from qwen_onnx.export.tower_options import TowerOptions


class AudioEncoderOptions(TowerOptions):
    """Of towers that hear."""

    implementation: ClassVar = "encoder.AudioEncoder"
    architectures: ClassVar = HEARING
    # Qwen2-Audio's: Whisper large's encoder and a projection
    weights: ClassVar = 645_000_000
