"""Options of ``OpenVINOPackage``."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field

from qwen_onnx.catalog.registry import PassOptions


class OpenVINOPackageOptions(PassOptions):
    """Options of ``OpenVINOPackage``."""

    implementation: ClassVar = "package.OpenVINOPackage"

    target_device: Literal["npu", "gpu", "cpu"]
    max_prompt_len: int = Field(gt=0, description="tokens of the longest prompt: the NPU compiles fixed shapes")
    min_response_len: int = Field(gt=0, description="tokens for which there is room behind the longest prompt")

    def reference(self) -> Self:
        """The same: an IR is packaged in any precision."""
        return self
