"""What the passes for towers have in common of their options. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

from qwen_onnx.catalog.costs import Dimensions, Stored
from qwen_onnx.catalog.registry import PassOptions


class TowerOptions(PassOptions):
    """Such a pass has no options: encoder and embedding keep the type of the checkpoint's weights.

    Attributes:
        weights: the most that a tower of the published models has.
        providers: execution providers whose runtime takes such an artifact.
    """

    weights: ClassVar[int]
    providers: ClassVar[tuple[str, ...]] = ("CPUExecutionProvider",)

    def faults(self, execution_provider: str) -> list[str]:
        """See ``providers``."""
        told = f"type: {self.pass_name()} is for {', '.join(self.providers)}, the target's is {execution_provider}"
        return [] if execution_provider in self.providers else [told]

    def reference(self) -> Self:
        """Itself: nothing is quantised."""
        return self

    def written(self, model: Dimensions, before: Stored) -> Stored:
        """The tower, and a table of embeddings beside the head."""
        embedding = model.stored * model.tables
        # beside a small model a small tower
        tower = min(self.weights, model.weights)
        return replace(before, embedding=embedding, rest=before.rest + model.stored * tower)

    def scratch(self, model: Dimensions, before: Stored) -> int:
        """The decoder's files are there twice for a moment."""
        return before.total
