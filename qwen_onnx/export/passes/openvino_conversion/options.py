"""Options of ``OpenVINOConversion``."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field

from qwen_onnx.catalog.architectures import DENSE
from qwen_onnx.catalog.costs import Dimensions, Stored, as_floats, packed
from qwen_onnx.catalog.registry import PassOptions

# the process, and its copies of the float32 weights
CONVERTER_BYTES, CONVERTER_COPIES = 620_000_000, 1.6
# of the checkpoint, as they are: optimum-intel saves a tokenizer anew
COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class OpenVINOConversionOptions(PassOptions):
    """Options of ``OpenVINOConversion``."""

    implementation: ClassVar = "convert.OpenVINOConversion"
    # tried on no others
    architectures: ClassVar = DENSE

    precision: Literal["int4", "int8", "fp16", "fp32"]
    group_size: Literal[64, 128, -1] = Field(
        default=128, description="weights that share a scale in int4; -1: all inputs of a channel, as in int8"
    )
    int4_share: float = Field(default=1.0, gt=0, le=1, description="part of the body's weights in int4, the rest int8")
    windows: int = Field(default=24, ge=1, description="calibration windows")
    window: int = Field(default=512, ge=32, description="tokens in a calibration window")
    seed: int = 0

    def reference(self) -> Self:
        """The IR in fp32."""
        return self.model_copy(update={"precision": "fp32"})

    def written(self, model: Dimensions, before: Stored) -> Stored:
        """An IR: a tied embedding stands there once, scales are fp16, rotary positions are computed."""
        if self.precision in ("fp16", "fp32"):
            return as_floats(model, 2 if self.precision == "fp16" else 4)
        four = int(model.body * self.int4_share) if self.precision == "int4" else 0
        block = self.group_size if self.group_size > 0 else model.widest
        body = packed(four, 4, block, symmetric=True, scale=2) + model.body - four
        return Stored(body, 0 if model.tied else model.tables, model.tables)

    def scratch(self, model: Dimensions, before: Stored) -> int:
        """The IR in float32, which is compressed, and as much again while it is converted; an upper bound."""
        return 2 * as_floats(model, 4).total

    def memory(self, model: Dimensions, before: Stored) -> int:
        """The converter holds the float32 weights; rough, not measured."""
        return CONVERTER_BYTES + int(CONVERTER_COPIES * as_floats(model, 4, tied=False).total)
