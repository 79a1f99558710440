"""Options of ``GenAIModelBuilder``."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Self

from pydantic import Field

from qwen_onnx.catalog.costs import Dimensions, Stored, as_floats, packed
from qwen_onnx.catalog.registry import PassOptions

# genai's names of execution providers, and ONNX Runtime's
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "dml": "DmlExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "NvTensorRtRtx": "NvTensorRTRTXExecutionProvider",
}
# weights that the builder's quantiser gets at once: k_quant holds some eighteen times their float32 size
MATRIX_PIECE = 1 << 20
# anonymous memory of the process with its imports (2026-11-25, as the quantiser's), and float32 copies at once: of
# the piece that k_quant gets; of head or embedding, which are converted whole; of one expert. A head that the builder
# quantises is there in float32 with its codes and scales (2026-11-29: 2.49 GB with Qwen3-4B's of 8 bits, 2.48 by this)
PROCESS_BYTES = 405_000_000
PIECES, TABLES, EXPERTS = 18, 1.1, 6
HEAD_OF_8_BITS = ("rtn_last", "k_quant_last", "k_quant_mixed")


class GenAIModelBuilderOptions(PassOptions):
    """Options of ``GenAIModelBuilder`` by the names of onnxruntime-genai 0.18."""

    implementation: ClassVar = "build.GenAIModelBuilder"

    precision: Literal["int4", "fp16", "fp32"]
    execution_provider: Literal["cpu", "cuda", "dml", "webgpu", "NvTensorRtRtx"] = "cpu"
    block_size: Literal[16, 32, 64, 128, 256] | None = None
    is_symmetric: bool | None = None
    accuracy_level: int | None = Field(default=None, ge=0, le=4)
    algo_config: Literal["default", "rtn", "k_quant", "rtn_last", "k_quant_last", "k_quant_mixed"] | None = None
    moe_quant_type: Literal["int4", "int8"] | None = Field(
        default=None, description="experts of a mixture; QMoE on the CPU takes symmetric weights from the builder"
    )
    qmoe_block_size: Literal[32, 64, 128] | None = Field(default=None, description="weights of an expert per scale")
    shared_embeddings: bool | None = Field(
        default=None, description="the embedding reads the head's weights; by default as the checkpoint ties them"
    )
    fuse_qkv: bool | None = Field(default=None, description="one MatMul for q, k and v")
    fuse_qk_norm_gqa: bool | None = Field(
        default=None, description="Qwen3's norms of q and k inside GroupQueryAttention, which the CPU cannot compute"
    )
    prune_lm_head: bool | None = Field(
        default=None, description="logits of the last position only: prefill needs no other"
    )

    def faults(self, execution_provider: str) -> list[str]:
        """The builder writes a graph for one provider, which must be the target's."""
        fits = PROVIDERS[self.execution_provider] == execution_provider
        told = f"execution_provider: {self.execution_provider} is not the target's {execution_provider}"
        return [] if fits else [told]

    def reference(self) -> Self:
        """The stock graph in fp32, for the CPU."""
        return type(self)(precision="fp32")

    @property
    def number(self) -> int:
        """Bytes of an input, an output and a scale."""
        if self.precision == "int4":
            return 4 if self.execution_provider == "cpu" else 2
        return 2 if self.precision == "fp16" else 4

    def written(self, model: Dimensions, before: Stored) -> Stored:
        """The graph's weights; sine and cosine of every position; an embedding of its own unless the head's serves."""
        number = self.number
        rotary, shared = number * model.context * model.head_dim, model.tied and self.shared_embeddings is not False
        if self.precision != "int4":
            floats = as_floats(model, number, tied=shared)
            return Stored(floats.body, floats.head, floats.embedding, rest=rotary)
        if before.scales:
            # codes as they come, scales in the graph's type
            body = before.body - (4 - number) * before.scales
            own = not shared or not before.head
            head = min(before.head, number * model.tables)
            scales = before.scales if number == 4 else 0
            embedding = number * model.tables if own else 0
            return Stored(body, head, embedding, rest=rotary, scales=scales, planes=before.planes)
        return replace(self._quantized(model, number), embedding=0 if shared else number * model.tables, rest=rotary)

    def _quantized(self, model: Dimensions, scale: int) -> Stored:
        """What the builder quantises itself: experts with scales of ``scale`` bytes, other matrices, head."""
        number, block, symmetric = self.number, self.block_size or 32, self.is_symmetric is not False
        plain = model.layers * (model.layer - model.experts - model.router)
        body = packed(plain, 4, block, symmetric=symmetric, scale=number)
        head_bits = 8 if self.algo_config in HEAD_OF_8_BITS else 4
        head = packed(model.tables, head_bits, block, symmetric=symmetric, scale=number)
        if model.experts:
            weights, bits = model.layers * model.experts, 8 if self.moe_quant_type == "int8" else 4
            body += packed(weights, bits, self.qmoe_block_size or block, symmetric=True, scale=scale)
        # routers stay float
        return Stored(body + number * model.layers * model.router, head, 0)

    def scratch(self, model: Dimensions, before: Stored) -> int:
        """Fused q, k and v, and the layers that the builder quantised."""
        fused = model.fused * model.layers * before.body // max(model.body, 1)
        return fused + self.kept(model, before)

    def kept(self, model: Dimensions, before: Stored) -> int:
        """The layers that the builder quantised itself, with half scales for experts; or experts that came in codes."""
        if before.scales:
            return before.body * model.layers * model.experts // max(model.body, 1)
        return self._quantized(model, 2).total if self.precision == "int4" else 0

    def memory(self, model: Dimensions, before: Stored) -> int:
        """The largest matrix, or the head and the embedding, which are converted whole; or one expert."""
        own = self.precision == "int4" and not before.scales
        table = 4 * model.tables + self._quantized(model, self.number).head if own else int(4 * TABLES * model.tables)
        whole = max(4 * model.largest, 0 if model.tied and before.scales else table)
        piece = 4 * PIECES * MATRIX_PIECE if own else 0
        return PROCESS_BYTES + max(whole + piece, 4 * EXPERTS * model.expert)
