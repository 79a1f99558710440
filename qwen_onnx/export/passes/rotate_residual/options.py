"""Options of ``RotateResidual``."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from qwen_onnx.catalog.architectures import DENSE
from qwen_onnx.catalog.costs import Dimensions, Stored, as_floats
from qwen_onnx.catalog.registry import PROCESS_BYTES, PassOptions


class RotateResidualOptions(PassOptions):
    """Options of ``RotateResidual``."""

    implementation: ClassVar = "rotate.RotateResidual"
    architectures: ClassVar = DENSE
    rewrites: ClassVar = True

    seed: int = Field(default=0, description="of the random orthogonal matrix")

    def written(self, model: Dimensions, before: Stored) -> Stored:
        """Float32, and a head of its own."""
        return as_floats(model, 4, tied=False)

    def memory(self, model: Dimensions, before: Stored) -> int:
        """Embedding and head, or all of one layer, turned and as they are written."""
        return PROCESS_BYTES + 8 * max(2 * model.tables, model.layer)
