"""Options of ``HtpContext``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from qwen_onnx.catalog.costs import Dimensions, Stored
from qwen_onnx.catalog.registry import PassOptions

COPIES = 3  # of the weights: one for two QDQ graphs, one in each of two contexts
BYTES_PER_LAYER = 180_000  # of two contexts, besides their weights


class HtpContextOptions(PassOptions):
    """Options of ``HtpContext``, by onnxruntime-qnn's names."""

    implementation: ClassVar = "context.HtpContext"

    soc_model: str = Field(default="60", pattern=r"^\d+$", description="Qualcomm's number of the chip")
    htp_arch: Literal["68", "69", "73", "75", "79", "81"] = "73"
    htp_graph_finalization_optimization_mode: Literal["0", "1", "2", "3"] = "3"

    def written(self, model: Dimensions, before: Stored) -> Stored:
        """The contexts beside the graphs."""
        return before.times(COPIES, BYTES_PER_LAYER * model.layers)
