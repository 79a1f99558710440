"""Options of ``PackWeights``."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from qwen_onnx.catalog.costs import Dimensions, Stored
from qwen_onnx.catalog.registry import PROCESS_BYTES, PassOptions

# codes that are in memory at once, and how often while a plane is made of them
PIECE, COPIES = 1 << 22, 4
# bytes of scales in both types, and of zero points, of the smallest block
SCALES, BLOCK = 12, 32


class PackWeightsOptions(PassOptions):
    """``PackWeights`` has no options: it packs what it can without a change of any weight."""

    implementation: ClassVar = "pack.PackWeights"

    def faults(self, execution_provider: str) -> list[str]:
        """Whether another provider folds what is packed was never tried."""
        fits = execution_provider == "CPUExecutionProvider"
        return [] if fits else [f"type: PackWeights is for CPUExecutionProvider, the target's is {execution_provider}"]

    def written(self, model: Dimensions, before: Stored) -> Stored:
        """Scales of half the size; codes as they were, since their values decide how small they become.

        An upper bound, if the quantiser rounded its scales to half precision.
        """
        return replace(before, body=before.body - 2 * before.scales, scales=0)

    def memory(self, model: Dimensions, before: Stored) -> int:
        """Some rows of a matrix, and all of its scales."""
        return PROCESS_BYTES + PIECE * COPIES + SCALES * max(model.largest, model.tables) // BLOCK
