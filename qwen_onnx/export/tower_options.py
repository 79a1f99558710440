"""What the passes for towers have in common of their options. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Self

from pydantic import Field

from qwen_onnx.catalog.costs import Dimensions, Stored
from qwen_onnx.catalog.registry import PassOptions

# weights of 8 bits that share a scale, and activations that are rounded together
BLOCK = 32


class TowerOptions(PassOptions):
    """The embedding keeps the type of the checkpoint's weights, and so does the encoder unless ``bits`` are given.

    Attributes:
        weights: the most that a tower of the published models has.
        providers: execution providers whose runtime takes such an artifact.
    """

    bits: Literal[8] | None = Field(
        default=None, description="of the weights of the encoder's layers; null: the checkpoint's own type"
    )

    weights: ClassVar[int]
    providers: ClassVar[tuple[str, ...]] = ("CPUExecutionProvider",)

    def faults(self, execution_provider: str) -> list[str]:
        """See ``providers``."""
        told = f"type: {self.pass_name()} is for {', '.join(self.providers)}, the target's is {execution_provider}"
        return [] if execution_provider in self.providers else [told]

    def reference(self) -> Self:
        """Without fewer bits."""
        return self.model_copy(update={"bits": None})

    def written(self, model: Dimensions, before: Stored) -> Stored:
        """The tower, and a table of embeddings beside the head."""
        embedding = model.stored * model.tables
        # codes, and a scale and a zero point of each block
        each = model.stored if self.bits is None else self.bits / 8 * (1 + 5 / BLOCK)
        return replace(before, embedding=embedding, rest=before.rest + int(each * self.adopted(model)))

    def adopted(self, model: Dimensions) -> int:
        """A bound: beside a small model a small tower."""
        return min(self.weights, model.weights)

    def widened(self, model: Dimensions) -> int:
        """Floats of the encoder become float32, for every provider."""
        return 0 if self.bits else (4 - model.stored) * self.adopted(model)

    def scratch(self, model: Dimensions, before: Stored) -> int:
        """The decoder's files are there twice for a moment."""
        return before.total
