"""Options of ``PackWeights``."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from qwen_onnx.catalog.costs import Dimensions, Stored
from qwen_onnx.catalog.registry import PROCESS_BYTES, PassOptions

# widths of the planes for codes of so many bits, the highest bits first; each divides a byte
WIDTHS = {4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
# a plane's part of the graph file, with that of the zero points: nodes, their names, gaps between tensors
PLANE_BYTES = 1_100
# codes that are in memory at once, and how often while a plane is made of them
PIECE, COPIES = 1 << 22, 4
# bytes of scales in both types, and of zero points, of the smallest block
SCALES, BLOCK, EXPERT_BLOCK = 12, 32, 16


class PackWeightsOptions(PassOptions):
    """``PackWeights`` has no options: it packs what it can without a change of any weight."""

    implementation: ClassVar = "pack.PackWeights"

    def faults(self, execution_provider: str) -> list[str]:
        """Whether another provider folds what is packed was never tried."""
        fits = execution_provider == "CPUExecutionProvider"
        return [] if fits else [f"type: PackWeights is for CPUExecutionProvider, the target's is {execution_provider}"]

    def written(self, model: Dimensions, before: Stored) -> Stored:
        """What the quantiser says of planes, else scales of half the size and codes as they were.

        An upper bound, if the quantiser rounded its scales to half precision.
        """
        if before.planes:
            head = before.planes * before.head // (before.body + before.head)
            return replace(before, body=before.planes - head, head=head, scales=0, planes=0)
        return replace(before, body=before.body - 2 * before.scales, scales=0)

    def memory(self, model: Dimensions, before: Stored) -> int:
        """Some rows of a matrix, and all of its scales, or those of a layer's experts."""
        scales = max(max(model.largest, model.tables) // BLOCK, 2 * model.experts // 3 // EXPERT_BLOCK)
        return PROCESS_BYTES + PIECE * COPIES + SCALES * scales
