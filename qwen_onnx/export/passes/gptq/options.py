"""Options of ``CalibratedGptq``."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from qwen_onnx.catalog.architectures import DENSE
from qwen_onnx.catalog.costs import LOGITS_PIECE, Dimensions, Stored, packed
from qwen_onnx.catalog.registry import PROCESS_BYTES, PassOptions

BATCH = 4  # calibration windows that a layer sees together
# what a tokenizer takes for the calibration text, which is let go before the first layer; one of bytes has four times
# the tokens, and no file of that size
CALIBRATION_BYTES, BYTE_CALIBRATION_BYTES, BYTE_TOKENIZER = 290_000_000, 520_000_000, 100_000
# float32 copies at once: of a Hessian (damped, Cholesky factor, inverse), of a matrix (weights, codes, dequantised,
# temporary), of a piece of logits (logits, log-probabilities, their gradient, its softmax)
HESSIANS, MATRICES, LOGITS = 3, 4, 4
FLOAT_BITS = 16  # a head of so many bits is not quantised


class CalibratedGptqOptions(PassOptions):
    """Options of ``CalibratedGptq``."""

    implementation: ClassVar = "quantize.CalibratedGptq"
    # transformers 5 keeps experts as fused tensors; genai wants the gates of linear attention unquantised
    architectures: ClassVar = DENSE

    bits: Literal[4, 8] = 4
    head_bits: Literal[4, 8, 16] = Field(
        default=8, description="bits of lm_head and of the embedding that shares it; 16 leaves it unquantised"
    )
    symmetric: bool = Field(default=False, description="all zero points in the middle of the grid")
    group_size: Literal[-1, 16, 32, 64, 128] = Field(
        default=32, description="weights that share a scale; -1: all that make one output"
    )
    mixed_blocks: bool = Field(
        default=False,
        description="half or twice group_size, by what rounded activations cost; no more scales than without",
    )
    rounding_kld: float | None = Field(
        default=None,
        gt=0,
        description="most KLD predicted of rounded activations; mixed_blocks get finer to keep to it",
    )
    int8_share: float = Field(default=0.0, ge=0, le=1, description="part of the body's weights that may have 8 bits")
    windows: int = Field(default=24, ge=4, description="calibration windows")
    window: int = Field(default=512, ge=32, description="tokens in a calibration window")
    sensitivity_windows: int = Field(default=8, ge=1, description="windows that choose 8-bit matrices or blocks")
    damp: float = Field(default=0.01, gt=0, lt=1, description="GPTQ damping, fraction of the mean diagonal")
    seed: int = 0
    calibration: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="SHA-256 of a text of yours: optimize --calibration"
    )

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.mixed_blocks and (self.group_size not in (32, 64) or self.int8_share):
            raise ValueError("mixed_blocks: only with group_size 32 or 64, and without int8_share")
        if self.rounding_kld is not None and not self.mixed_blocks:
            raise ValueError("rounding_kld: only with mixed_blocks")
        return self

    @property
    def _sampled(self) -> bool:
        """Whether gradients choose bits or blocks."""
        return self.mixed_blocks or self.int8_share > 0

    def written(self, model: Dimensions, before: Stored) -> Stored:
        """Codes with float32 scales; the embedding stays, in float32."""
        # where a whole row shares a scale, the matrices with the shortest rows count
        block = self.group_size if self.group_size > 0 else model.hidden
        eight = int(model.body * self.int8_share)
        parts = ((eight, 8), (model.body - eight, self.bits))
        body = sum(packed(weights, bits, block, symmetric=self.symmetric, scale=4) for weights, bits in parts)
        if self.head_bits > 8:
            return Stored(body, before.head and 4 * model.tables, 4 * model.tables, scales=model.body // block)
        head = packed(model.tables, self.head_bits, block, symmetric=self.symmetric, scale=4)
        return Stored(body, head, 4 * model.tables, scales=(model.body + model.tables) // block)

    def scratch(self, model: Dimensions, before: Stored) -> int:
        """Weights, squared gradients and Hessians of a layer; the hidden states of every window, twice."""
        layer = 4 * (model.layer + 3 * model.hidden**2 + model.widest**2)
        states = 4 * self.window * model.hidden
        if not self._sampled:
            return layer + 2 * states * self.windows
        # besides: gradients; head and noise in float32; the states in front of every layer
        layer += 4 * (model.layer + model.largest + model.tables + self.window * model.vocabulary)
        # nothing is written by then
        sampled = states * self.sensitivity_windows * (model.layers + 2) - self.written(model, before).total
        return layer + max(sampled, 2 * states * self.windows)

    def kept(self, model: Dimensions, before: Stored) -> int:
        """Every finished layer: the output links to it."""
        return self.written(model, before).total

    def memory(self, model: Dimensions, before: Stored) -> int:
        """The largest of calibration text, head, Hessian with its matrix, a batch of a layer, and logits."""
        tokens = BATCH * self.window
        stages = [
            BYTE_CALIBRATION_BYTES if model.tokenizer < BYTE_TOKENIZER else CALIBRATION_BYTES,
            4 * (HESSIANS * model.widest**2 + MATRICES * model.largest),
            # the product x·xᵀ beside the batch's activations: four as wide as the MLP, six hidden states
            4 * (model.widest**2 + tokens * (4 * model.widest + 6 * model.hidden)),
            4 * LOGITS * min(self.window * model.vocabulary, LOGITS_PIECE) if self._sampled else 0,
        ]
        return PROCESS_BYTES + max(stages)
