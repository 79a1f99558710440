"""The Olive passes that recipes may name, each with its exact options.

Olive only warns about a mistyped option and genai's builder says nothing at all, so the options are
checked here, before anything runs and without importing Olive.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qwen_onnx.records import Record

# genai's names of execution providers, and ONNX Runtime's
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "dml": "DmlExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "NvTensorRtRtx": "NvTensorRTRTXExecutionProvider",
}

# how much our passes hold at once, which the estimate of their memory needs, too
BATCH = 4  # calibration windows that a layer sees together
# more logits than this are made piece by piece; those of 512 tokens and 65,536 words stay in one piece
LOGITS_PIECE = 1 << 25
# weights that the builder's quantiser gets at once: k_quant holds some eighteen times their float32 size
MATRIX_PIECE = 1 << 20


class GenAIModelBuilderConfig(Record):
    """Options of ``qwen_onnx.export.passes.genai_builder.build.GenAIModelBuilder`` (onnxruntime-genai 0.18 names)."""

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


class CalibratedGptqConfig(Record):
    """Options of ``qwen_onnx.export.passes.gptq.quantize.CalibratedGptq``."""

    bits: Literal[4, 8] = 4
    head_bits: Literal[4, 8, 16] = Field(
        default=8, description="bits of lm_head and of the embedding that shares it; 16 leaves it unquantised"
    )
    symmetric: bool = Field(default=False, description="all zero points in the middle of the grid")
    group_size: Literal[-1, 16, 32, 64, 128] = Field(
        default=32, description="weights that share a scale; -1: all that make one output"
    )
    int8_share: float = Field(default=0.0, ge=0, le=1, description="part of the body's weights that may have 8 bits")
    windows: int = Field(default=24, ge=4, description="calibration windows")
    window: int = Field(default=512, ge=32, description="tokens in a calibration window")
    sensitivity_windows: int = Field(default=8, ge=1, description="windows that choose the 8-bit matrices")
    damp: float = Field(default=0.01, gt=0, lt=1, description="GPTQ damping, fraction of the mean diagonal")
    seed: int = 0


class OpenVINOConversionConfig(Record):
    """Options of ``qwen_onnx.export.passes.openvino_conversion.convert.OpenVINOConversion``."""

    precision: Literal["int4", "int8", "fp16", "fp32"]
    group_size: Literal[64, 128, -1] = Field(
        default=128, description="weights that share a scale in int4; -1: all inputs of a channel, as in int8"
    )
    int4_share: float = Field(default=1.0, gt=0, le=1, description="part of the body's weights in int4, the rest int8")
    windows: int = Field(default=24, ge=1, description="calibration windows")
    window: int = Field(default=512, ge=32, description="tokens in a calibration window")
    seed: int = 0


class OpenVINOPackageConfig(Record):
    """Options of ``qwen_onnx.export.passes.openvino_conversion.convert.OpenVINOPackage``."""

    target_device: Literal["npu", "gpu", "cpu"]
    max_prompt_len: int = Field(gt=0, description="tokens of the longest prompt: the NPU compiles fixed shapes")
    min_response_len: int = Field(gt=0, description="tokens for which there is room behind the longest prompt")


class RotateResidualConfig(Record):
    """Options of ``qwen_onnx.export.passes.rotate_residual.rotate.RotateResidual``."""

    seed: int = Field(default=0, description="of the random orthogonal matrix")


class HtpQdqExportConfig(Record):
    """Options of ``qwen_onnx.export.passes.htp_qdq.export.HtpQdqExport``."""

    form: Literal["qdq", "float"] = Field(
        default="qdq", description="float: the same graphs without quantisation, of any checkpoint, for the CPU"
    )
    prefill: int = Field(default=64, ge=2, description="tokens in a window of the prefill graph")
    context: int = Field(default=1024, ge=32, description="tokens that the KV cache holds")
    windows: int = Field(default=8, ge=1, description="calibration windows")
    window: int = Field(default=512, ge=32, description="tokens in a calibration window")
    seed: int = 0


class HtpContextConfig(Record):
    """Options of ``qwen_onnx.export.passes.htp_context.context.HtpContext``, by onnxruntime-qnn's names."""

    soc_model: str = Field(default="60", pattern=r"^\d+$", description="Qualcomm's number of the chip")
    htp_arch: Literal["68", "69", "73", "75", "79", "81"] = "73"
    htp_graph_finalization_optimization_mode: Literal["0", "1", "2", "3"] = "3"


# Dense models, whose weights are all linear layers. CalibratedGptq can quantise no others: transformers 5 keeps
# experts as fused tensors, and genai wants the gates of linear attention unquantised. OpenVINOConversion was tried on
# no others.
DENSE = (
    "QWenLMHeadModel",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)

DENSE_ONLY = ("CalibratedGptq", "HtpQdqExport", "OpenVINOConversion", "RotateResidual")

STEP_CONFIGS: dict[str, type[Record]] = {
    "CalibratedGptq": CalibratedGptqConfig,
    "GenAIModelBuilder": GenAIModelBuilderConfig,
    "OpenVINOConversion": OpenVINOConversionConfig,
    "OpenVINOPackage": OpenVINOPackageConfig,
    "HtpContext": HtpContextConfig,
    "HtpQdqExport": HtpQdqExportConfig,
    "RotateResidual": RotateResidualConfig,
}
