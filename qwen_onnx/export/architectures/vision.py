"""The decoders of models that see for genai's builder, whose weights are those of a Qwen2, a Qwen3 or a Qwen3-MoE.

genai 0.18 knows Qwen2.5-VL's and Qwen3-VL's only, and reads them from whole checkpoints; Qwen2-VL's is the former. Of
Qwen3-VL it leaves out DeepStack: what several layers of the tower say of a picture is added to its tokens behind the
first layers of the decoder. Here these parts come in the same input as the embeddings, behind them, so that whatever
hands over embeddings hands them over too; for text they are zeros.
"""

from __future__ import annotations

from typing import Any

from qwen_onnx.errors import ExportError
from qwen_onnx.export.architectures.moe import Qwen3MoEModel, SparseExperts
from qwen_onnx.export.architectures.stock import Model, Qwen3VLTextModel, Qwen25VLTextModel
from qwen_onnx.sources.vision_config import DEEPSTACK_LAYERS

EMBEDDED = "inputs_embeds"
PART = "/model/deepstack/part_{}"


class _TextWeights:
    """Weights of what the checkpoint's config.json says it is; comes before a class of genai's."""

    model_type: str
    own_type = ""

    def load_weights(self, input_path: str) -> Any:
        """As a language model that reads text."""
        own: str = self.model_type
        self.model_type = self.own_type
        try:
            return Model.load_weights(self, input_path)
        finally:
            self.model_type = own


class VisionDecoder(_TextWeights, Qwen25VLTextModel):  # type: ignore[misc]
    """Embeddings instead of token ids, positions on three axes."""

    own_type = "Qwen2ForCausalLM"


class DeepStackDecoder(_TextWeights, Qwen3VLTextModel):  # type: ignore[misc]
    """The same of a Qwen3, with DeepStack: ``inputs_embeds`` is [batch, tokens, (1 + layers) * hidden].

    Raises:
        ExportError: config.json does not say how many layers.
    """

    own_type = "Qwen3ForCausalLM"

    def __init__(self, config: Any, *others: Any) -> None:
        super().__init__(config, *others)
        self.stacked: int = getattr(config, DEEPSTACK_LAYERS, 0)
        if not self.stacked:
            raise ExportError(f"config.json lacks {DEEPSTACK_LAYERS}", hint="build from the whole checkpoint")

    def make_inputs_and_outputs(self) -> None:
        """See ``Model``."""
        self.input_shapes[EMBEDDED] = ["batch_size", "sequence_length", self.hidden_size * (1 + self.stacked)]
        super().make_inputs_and_outputs()

    def make_preprocessing_nodes(self) -> None:
        """See ``Model``: the input falls into embeddings and what each layer adds."""
        super().make_preprocessing_nodes()
        parts = [PART.format(index) for index in range(1 + self.stacked)]
        self.make_node(
            "Split",
            inputs=[EMBEDDED],
            outputs=parts,
            name="/model/deepstack/Split",
            axis=-1,
            num_outputs=len(parts),
        )
        for part in parts:
            self.make_value(part, self.io_dtype, shape=self.make_hidden_state_shape())

    def make_layer(self, layer_id: int, layer: Any) -> None:
        """See ``Model``."""
        attributes = self.layernorm_attrs
        if layer_id == 0:
            attributes["root_input"] = attributes["skip_input"] = PART.format(0)
        super().make_layer(layer_id, layer)
        if layer_id < self.stacked:
            # a layer's output is the sum of root and skip, which the next norm takes
            name, parts = (
                f"/model/layers.{layer_id}/deepstack/Add",
                [attributes["skip_input"], PART.format(layer_id + 1)],
            )
            self.make_add(name, parts, dtype=self.io_dtype, shape=self.make_hidden_state_shape())
            attributes["skip_input"] = f"{name}/output_0"


class DeepStackMoEDecoder(SparseExperts, DeepStackDecoder):
    """The same of a Qwen3-MoE."""

    own_type = "Qwen3MoeForCausalLM"
    make_moe_subgraph = Qwen3MoEModel.make_moe_subgraph
