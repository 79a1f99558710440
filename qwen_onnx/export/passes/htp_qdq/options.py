"""Options of ``HtpQdqExport``."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field

from qwen_onnx.catalog.architectures import DENSE
from qwen_onnx.catalog.costs import Dimensions, Stored, as_floats
from qwen_onnx.catalog.registry import PassOptions

# the process, and its copies of the float32 weights (2026-11-25, the starter: 1.65 GB)
CALIBRATOR_BYTES, CALIBRATOR_COPIES = 620_000_000, 1.6
BYTES_PER_LAYER = 86_000  # of two graphs, besides their weights


class HtpQdqExportOptions(PassOptions):
    """Options of ``HtpQdqExport``."""

    implementation: ClassVar = "export.HtpQdqExport"
    architectures: ClassVar = DENSE

    form: Literal["qdq", "float"] = Field(
        default="qdq", description="float: the same graphs without quantisation, of any checkpoint, for the CPU"
    )
    prefill: int = Field(default=64, ge=2, description="tokens in a window of the prefill graph")
    context: int = Field(default=1024, ge=32, description="tokens that the KV cache holds")
    windows: int = Field(default=8, ge=1, description="calibration windows")
    window: int = Field(default=512, ge=32, description="tokens in a calibration window")
    seed: int = 0

    def reference(self) -> Self:
        """The same graphs in float."""
        return self.model_copy(update={"form": "float"})

    def written(self, model: Dimensions, before: Stored) -> Stored:
        """Two graphs over one copy of the weights; 16-bit tables of embeddings and of rotary positions."""
        number = 2 if self.form == "qdq" else 4
        rest = 2 * number * self.context * model.head_dim + BYTES_PER_LAYER * model.layers
        head, body = (before.head, before.body) if self.form == "qdq" else (4 * model.tables, 4 * model.body)
        return Stored(body, head, number * model.tables, rest=rest, scales=before.scales)

    def scratch(self, model: Dimensions, before: Stored) -> int:
        """The float graph that calibrates."""
        return as_floats(model, 4, tied=False).total if self.form == "qdq" else 0

    def memory(self, model: Dimensions, before: Stored) -> int:
        """ONNX Runtime holds the weights of the float graph."""
        return CALIBRATOR_BYTES + int(CALIBRATOR_COPIES * as_floats(model, 4, tied=False).total)
