"""Options of ``FisherGptq``."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from qwen_onnx.catalog.architectures import ARCHITECTURES
from qwen_onnx.catalog.costs import LOGITS_PIECE, Dimensions, Stored, packed
from qwen_onnx.catalog.registry import PROCESS_BYTES, PassOptions

# weights of a row that share a scale, unless ``group_size`` says otherwise, or half of that
BLOCK = 64
# what most experts have, whose grids are of one block, half of it and a quarter
EXPERT_BLOCK = 32
# blocks of the matrices that hold codes of ``kernel: int8``; every block above is a multiple
KERNEL_BLOCK = 16
# blocks of the matrices of 8 bits among those of 4
MIXED_BLOCK = 32
# bits of a matrix that stays as it is, in half precision
FLOAT_BITS = 16
# float32 copies at once: of a Hessian (damped, factor, inverse, its factor), of the layer's largest matrix on one grid
# (weights, codes, temporaries), of a piece of logits
HESSIANS, MATRICES, LOGITS = 4, 5, 5
# grids that are solved together, those of 8 bits apart
TOGETHER = {"mixed": 2, "int8": 4, "symmetric": 1}
# what a tokenizer takes for the calibration text, which is let go before the first layer
CALIBRATION_BYTES = 520_000_000
# what genai's builder keeps of a layer besides its matrices: nodes of the graph, norms
LAYER_BYTES = 16_000


class FisherGptqOptions(PassOptions):
    """Options of ``FisherGptq``. One of ``bits_per_weight``, ``max_bytes`` and ``max_kld`` says how small."""

    implementation: ClassVar = "quantize.FisherGptq"
    architectures: ClassVar = frozenset(ARCHITECTURES)

    kernel: Literal["mixed", "int8", "symmetric"] = Field(
        default="mixed",
        description="mixed: matrices of 4 or 8 bits; int8: codes of 4 to 8 bits in matrices of 8; symmetric: matrices "
        "of 4 bits without zero points, or floats",
    )
    group_size: Literal[32, 64] = Field(default=64, description="weights that share a scale; mixed: or half of it")
    activation_bits: Literal[8, 16] = Field(
        default=8,
        description="of what the kernels multiply; 8: rounded in the blocks of a matrix, finer ones of 8 bits for it; "
        "16: as the graph's floats",
    )
    shared_embedding: bool = Field(default=True, description="a tied embedding reads the head's codes")
    head_bits: Literal[5, 6, 7, 8, 16] = Field(
        default=6, description="bits of lm_head and of the embedding that shares it; 16 leaves it unquantised"
    )
    bits_per_weight: float | None = Field(
        default=None,
        gt=4,
        le=9,
        description="bytes of body and head, as they are stored, by the number of weights; of the body alone where "
        "the head is unquantised",
    )
    max_bytes: int | None = Field(default=None, gt=0, description="most bytes of the model's files")
    max_kld: float | None = Field(default=None, gt=0, description="most KLD that is predicted")
    windows: int = Field(default=128, ge=4, description="calibration windows")
    window: int = Field(default=256, ge=32, description="tokens in a calibration window")
    damp: float = Field(default=0.01, gt=0, lt=1, description="added to the diagonal, as a fraction of its mean")
    refinements: int = Field(default=2, ge=0, le=8, description="turns of moving codes and scales after GPTQ")
    seed: int = 0
    calibration: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="SHA-256 of a text of yours: optimize --calibration"
    )

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        given = [self.bits_per_weight, self.max_bytes, self.max_kld]
        if sum(bound is not None for bound in given) != 1:
            raise ValueError("exactly one of bits_per_weight, max_bytes and max_kld says how small the model gets")
        return self

    @model_validator(mode="after")
    def _what_kernels_have(self) -> Self:
        if (self.kernel == "symmetric") != (self.head_bits == FLOAT_BITS):
            raise ValueError("head_bits: the kernel symmetric, and no other, leaves the head at 16")
        if self.kernel == "int8" and (self.group_size, self.activation_bits) != (BLOCK, 8):
            raise ValueError(f"kernel int8 has group_size {BLOCK} and activation_bits 8")
        return self

    def written(self, model: Dimensions, before: Stored) -> Stored:
        """Codes with float32 scales; the embedding stays, in float32."""
        floats = model.layers * model.router
        weights, bits = model.body - floats + model.tables, self.bits_per_weight or 6
        if self.kernel == "int8":
            body, head = (self._coded(part, 8, KERNEL_BLOCK) for part in (model.body, model.tables))
            scales, planes = weights // KERNEL_BLOCK, int(weights * bits / 8)
            return Stored(body, head, 4 * model.tables, scales=scales, planes=planes)
        if self.kernel == "symmetric":
            return self._symmetric(model, before)
        routed = model.layers * model.experts
        plain, blocks = model.body - floats - routed, (weights - routed) // self.group_size + routed // EXPERT_BLOCK
        # finer blocks of 8 bits repeat scales, which count once
        head = self._coded(model.tables, 8)
        # scales of two bytes count in bits_per_weight, and are stored in four
        body = int(weights * bits / 8 - model.tables * self.head_bits / 8) + 2 * blocks
        most = self._coded(plain, 8) + self._coded(routed, 4, BLOCK // 4)
        body = min(max(body, self._coded(plain + routed, 4)), most)
        return Stored(body + 4 * floats, head, 4 * model.tables, scales=blocks)

    def _symmetric(self, model: Dimensions, before: Stored) -> Stored:
        bits = 4 + 16 / self.group_size
        floats = int(model.body * max((self.bits_per_weight or 6) - bits, 0) / (FLOAT_BITS - bits))
        codes = packed(model.body - floats, 4, self.group_size, symmetric=True, scale=4)
        # floats become the graph's, as scales do
        scales = floats + (model.body - floats) // self.group_size
        return Stored(codes + 4 * floats, before.head and 4 * model.tables, 4 * model.tables, scales=scales)

    @staticmethod
    def _coded(weights: int, bits: int, block: int = BLOCK) -> int:
        return int(weights * bits / 8 + weights / block * (4 + bits / 8))

    def scratch(self, model: Dimensions, before: Stored) -> int:
        """Inputs of every layer for every window, weights and Hessians of a layer, and every matrix on every grid.

        Of a layer with experts, also what these read.
        """
        states = 4 * self.windows * self.window * model.hidden * (model.layers + 2)
        states += 4 * self.windows * self.window * self._routed(model)
        layer = 4 * (model.layer + 3 * model.hidden**2 + model.widest**2 + model.tables)
        return states + layer + self._candidates(model)

    def _candidates(self, model: Dimensions) -> int:
        routed = model.layers * model.experts
        experts = sum(self._coded(routed, 4, BLOCK // finer) for finer in (1, 2, 4))
        kinds = (8,) * 5 if self.kernel == "int8" else (4, 4, 8)
        return experts + sum(self._coded(model.body - routed, bits) for bits in kinds)

    @staticmethod
    def _routed(model: Dimensions) -> int:
        """Numbers that the experts of one token read."""
        return model.hidden + model.chosen * model.expert // (3 * model.hidden) if model.experts else 0

    def kept(self, model: Dimensions, before: Stored) -> int:
        """Every finished layer: the output links to it."""
        return self.written(model, before).total

    def memory(self, model: Dimensions, before: Stored) -> int:
        """The largest of calibration text, a Hessian with its matrix on all grids, an expert's, and logits."""
        stages = [
            CALIBRATION_BYTES,
            4 * (HESSIANS * model.widest**2 + TOGETHER[self.kernel] * MATRICES * 3 * model.largest),
            4 * LOGITS * min(self.window * model.vocabulary, LOGITS_PIECE),
            self._expert(model) if model.experts else 0,
        ]
        return PROCESS_BYTES + max(stages)

    def _expert(self, model: Dimensions) -> int:
        """An expert on all its grids, and the tokens of one that gets twice its part."""
        tokens = self.windows * self.window * min(2 * model.chosen * model.expert / model.experts, 1)
        return 4 * int(HESSIANS * model.hidden**2 + 3 * MATRICES * model.expert + 2 * tokens * model.hidden)
