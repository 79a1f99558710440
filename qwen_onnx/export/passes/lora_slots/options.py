"""Options of ``LoraSlots``."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from qwen_onnx.catalog.architectures import DENSE
from qwen_onnx.catalog.registry import PassOptions
from qwen_onnx.catalog.training import MOST_RANK


class LoraSlotsOptions(PassOptions):
    """Options of ``LoraSlots``. The slots are empty: neither the files nor the memory of a build grow by them."""

    implementation: ClassVar = "insert.LoraSlots"
    # experts are one operator, whose inputs are not the graph's to change
    architectures: ClassVar = DENSE

    rank: int = Field(default=16, ge=1, le=MOST_RANK, description="the largest of an adapter that fits")

    def faults(self, execution_provider: str) -> list[str]:
        """Who computes in half precision would need slots of that type, which were never tried."""
        fits = execution_provider == "CPUExecutionProvider"
        return [] if fits else [f"type: LoraSlots is for CPUExecutionProvider, the target's is {execution_provider}"]
