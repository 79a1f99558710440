"""Options of ``VisionEncoder``."""

from __future__ import annotations

from typing import ClassVar

from qwen_onnx.catalog.architectures import SEEING
from qwen_onnx.export.tower_options import TowerOptions


class VisionEncoderOptions(TowerOptions):
    """Of towers that see."""

    implementation: ClassVar = "encoder.VisionEncoder"
    architectures: ClassVar = SEEING
    # of the towers of Qwen2-VL and Qwen2.5-VL, of all sizes: 0.67 billion at most
    weights: ClassVar = 700_000_000
    providers: ClassVar = (
        "CPUExecutionProvider",
        "CUDAExecutionProvider",
        "DmlExecutionProvider",
        "WebGpuExecutionProvider",
    )
