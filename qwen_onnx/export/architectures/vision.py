"""The decoder of Qwen2-VL and Qwen2.5-VL for genai's builder, whose weights are those of a Qwen2.

genai 0.18 knows Qwen2.5-VL's only, and reads it from a whole checkpoint; Qwen2-VL's is the same.
"""

from __future__ import annotations

from typing import Any

from qwen_onnx.export.architectures.stock import Model, Qwen25VLTextModel


class VisionDecoder(Qwen25VLTextModel):  # type: ignore[misc]
    """Embeddings instead of token ids, positions on three axes."""

    model_type: str

    def load_weights(self, input_path: str) -> Any:
        """As of the Qwen2 that the checkpoint's config.json says it is."""
        own: str = self.model_type
        self.model_type = "Qwen2ForCausalLM"
        try:
            return Model.load_weights(self, input_path)
        finally:
            self.model_type = own
