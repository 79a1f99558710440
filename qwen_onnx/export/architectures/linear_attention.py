"""Linear attention whose projections come in codes, for genai's builder."""

from __future__ import annotations

from typing import Any

from qwen_onnx.export.architectures.stock import Qwen35Model, Qwen35TextModel

PLACE = "/linear_attn/"


class CodedProjections:
    """Mixin: genai 0.18 looks for what the projections give under the names that those in float have."""

    def make_matmul(self: Any, matmul: Any, basename: str, root_input: str, **options: Any) -> str:
        """genai's own; what it gives in linear attention is called the same, whatever the matrix is."""
        name: str = super().make_matmul(matmul, basename, root_input, **options)  # type: ignore[misc]
        if name == basename or PLACE not in basename:
            return name
        value = self.values.pop(f"{name}/output_0")
        value.name = f"{basename}/output_0"
        self.values[value.name] = value
        return basename


class Qwen35TextCodedProjections(CodedProjections, Qwen35TextModel):  # type: ignore[misc]
    """The stock decoder of Qwen3.5 but for the names."""


class Qwen35CodedProjections(Qwen35Model):  # type: ignore[misc]
    """genai wraps its Qwen3.5 decoders in a class that may add a head for multi-token prediction."""

    def get_decoder_model_class(self) -> type:
        """The decoder that this class wraps."""
        return Qwen35TextCodedProjections
