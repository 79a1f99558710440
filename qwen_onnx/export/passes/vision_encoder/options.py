"""Options of ``VisionEncoder``."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from qwen_onnx.catalog.architectures import SEEING
from qwen_onnx.catalog.costs import Dimensions, Stored
from qwen_onnx.catalog.registry import PassOptions

# weights of the towers of Qwen2-VL and Qwen2.5-VL, of all sizes: 0.67 billion at most
TOWER = 700_000_000


class VisionEncoderOptions(PassOptions):
    """``VisionEncoder`` has no options: encoder and embedding keep the type of the checkpoint's weights."""

    implementation: ClassVar = "encoder.VisionEncoder"
    architectures: ClassVar = SEEING

    def faults(self, execution_provider: str) -> list[str]:
        """Its operators were tried on the CPU alone."""
        fits = execution_provider == "CPUExecutionProvider"
        return (
            [] if fits else [f"type: VisionEncoder is for CPUExecutionProvider, the target's is {execution_provider}"]
        )

    def reference(self) -> VisionEncoderOptions:
        """Itself: nothing is quantised."""
        return self

    def written(self, model: Dimensions, before: Stored) -> Stored:
        """The tower, and a table of embeddings beside the head."""
        return replace(before, embedding=model.stored * model.tables, rest=before.rest + model.stored * TOWER)

    def scratch(self, model: Dimensions, before: Stored) -> int:
        """The decoder's files are there twice for a moment."""
        return before.total
