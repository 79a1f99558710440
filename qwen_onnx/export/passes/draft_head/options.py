"""Options of ``DraftHead``."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from qwen_onnx.catalog.architectures import DRAFTING
from qwen_onnx.catalog.costs import Dimensions, Stored, packed
from qwen_onnx.catalog.registry import PassOptions

# of genai's quantiser
BLOCK = 32


class DraftHeadOptions(PassOptions):
    """Options of ``DraftHead``. A head that guesses wrongly costs time and changes no answer."""

    implementation: ClassVar = "head.DraftHead"
    architectures: ClassVar = DRAFTING

    bits: Literal[4, 8] = Field(default=8, description="of the head's matrices, which are rounded to nearest")

    def faults(self, execution_provider: str) -> list[str]:
        """Whoever drives other providers drafts with no such head."""
        fits = execution_provider == "CPUExecutionProvider"
        return [] if fits else [f"type: DraftHead is for CPUExecutionProvider, the target's is {execution_provider}"]

    def written(self, model: Dimensions, before: Stored) -> Stored:
        """One layer, and the matrix before it, in float32 scales and zero points of blocks of 32."""
        added = packed(self._weights(model), self.bits, BLOCK, symmetric=False, scale=4)
        return replace(before, rest=before.rest + added)

    def adopted(self, model: Dimensions) -> int:
        """The weights of the head."""
        return self._weights(model)

    def _weights(self, model: Dimensions) -> int:
        return model.layer + 2 * model.hidden**2

    def scratch(self, model: Dimensions, before: Stored) -> int:
        """The decoder's files are there twice for a moment."""
        return before.total

    def memory(self, model: Dimensions, before: Stored) -> int:
        """The head in float32, and again what is quantised."""
        return super().memory(model, before) + 8 * self._weights(model)
