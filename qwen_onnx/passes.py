"""The Olive passes that recipes may name, each with its exact options.

Olive only warns about a mistyped option and genai's builder says nothing at all, so the options are
checked here, before anything runs and without importing Olive.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qwen_onnx.schema import Record


class GenAIModelBuilderConfig(Record):
    """Options of ``qwen_onnx.export.builder.GenAIModelBuilder`` (onnxruntime-genai 0.18 names)."""

    precision: Literal["int4", "fp16", "fp32"]
    block_size: Literal[16, 32, 64, 128, 256] | None = None
    is_symmetric: bool | None = None
    accuracy_level: int | None = Field(default=None, ge=0, le=4)
    algo_config: Literal["default", "rtn", "k_quant", "rtn_last", "k_quant_last", "k_quant_mixed"] | None = None


STEP_CONFIGS: dict[str, type[Record]] = {"GenAIModelBuilder": GenAIModelBuilderConfig}
