"""Heads for multi-token prediction for genai's builder, each as a graph of its own.

Such a head is one decoder layer, which makes of the hidden state behind a token, and of the next token, a hidden state
like the one that the model will have behind that. The model's own embedding and head stand before and behind it.
genai's builder gives it copies of both, which would be most of its bytes, and the decoder another output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen_onnx.artifact.draft_head import EMBEDDED, PLACES
from qwen_onnx.errors import ExportError
from qwen_onnx.export.architectures.moe import FloatRouting
from qwen_onnx.export.architectures.stock import (
    MTPModel,
    Qwen35DenseMTPModel,
    Qwen35Model,
    Qwen35MoEModel,
    Qwen35MTPModel,
    QwenMTPModel,
    builder,
)
from qwen_onnx.export.weights import CheckpointWeights

# what the names of its weights begin with, and those of its only layer; its norms beside that
HEAD, LAYER = "mtp.", "mtp.layers.0."
NORMS = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")


class OtherHeadError(Exception):
    """The head has other weights than those of Qwen3.5, which transformers and genai's builder know."""


class BetweenEmbeddingAndHead:
    """Mixin: genai's graph of a head without the model's embedding before it and the model's head behind it."""

    def __init__(self: Any, config: Any, io_dtype: Any, onnx_dtype: Any, ep: str, cache: str, extra: Any) -> None:
        text = getattr(config, "text_config", config)
        text.max_position_embeddings = config.max_position_embeddings = min(text.max_position_embeddings, PLACES)
        super().__init__(config, io_dtype, onnx_dtype, ep, cache, {**extra, "exclude_embeds": True})  # type: ignore[call-arg]
        del self.output_names["logits"]

    def load_mtp_weights(self: Any, input_path: str) -> None:
        """Those of the checkpoint whose names begin with ``HEAD``."""
        weights, width = CheckpointWeights(Path(input_path)), self.hidden_size
        state = {name: tensor.float() for name, tensor in weights.tensors(weights.names(HEAD)).items()}
        outer = {name: tuple(tensor.shape) for name, tensor in state.items() if not name.startswith(LAYER)}
        norms = dict.fromkeys((f"{HEAD}{name}.weight" for name in NORMS), (width,))
        known = {**norms, f"{HEAD}fc.weight": (width, 2 * width)}
        if outer.keys() != known.keys():
            raise OtherHeadError(f"{sorted(outer.keys() ^ known.keys())[0]} is there, or is not")
        if outer != known:
            raise _unfit(f"beside its layer it has {outer}", input_path)
        try:
            self.mtp_weights = QwenMTPModel.from_state(state, None, None, self.mtp_layer_config, self.is_moe_mtp)
        # of names
        except ValueError as error:
            raise OtherHeadError(str(error)[:300]) from error
        # of shapes
        except RuntimeError as error:
            raise _unfit(str(error), input_path) from error

    def make_mtp_embedding(self, basename: str) -> str:
        """The embedding is an input."""
        return EMBEDDED

    def make_lm_head(self, lm_head: Any) -> None:
        """The hidden states are the output."""


class DenseHead(BetweenEmbeddingAndHead, Qwen35DenseMTPModel):  # type: ignore[misc]
    """Of Qwen3.5, Qwen3.6 and Qwen3.8."""


class SparseHead(FloatRouting, BetweenEmbeddingAndHead, Qwen35MTPModel):  # type: ignore[misc]
    """Of their mixtures."""


class _Alone:
    """Mixin: of decoder and head the builder makes the head."""

    def make_mtp_init(self: Any, config: Any, extra_options: Any) -> Any:
        """genai's own base; its Qwen3.5 would give the decoder another output."""
        options = MTPModel.make_mtp_init(self, config, extra_options)
        self.mtp_attrs["build"] = True
        return options

    def make_model(self: Any, input_path: str) -> None:
        self.mtp.make_model(input_path)

    def save_model(self: Any, folder: str) -> None:
        self.mtp.save_model(folder)

    def make_genai_config(self, config: Any, extra: Any, folder: str) -> None:
        """The decoder has one."""

    def save_processing(self, name: str, extra: Any, folder: str) -> None:
        """The decoder has them."""


class DenseHeadAlone(_Alone, Qwen35Model):  # type: ignore[misc]
    """What create_model constructs."""

    def get_mtp_model_class(self) -> type:
        """The graph of the head."""
        return DenseHead


class SparseHeadAlone(_Alone, Qwen35MoEModel):  # type: ignore[misc]
    """What create_model constructs of a mixture."""

    def get_mtp_model_class(self) -> type:
        """The graph of the head."""
        return SparseHead


ALONE = {
    "Qwen3_5ForConditionalGeneration": ("Qwen35Model", DenseHeadAlone),
    "Qwen3_5MoeForConditionalGeneration": ("Qwen35MoEModel", SparseHeadAlone),
}


def _unfit(what: str, checkpoint: str) -> ExportError:
    told = f"the head for multi-token prediction is not that of its architecture: {what}"
    hint = "use the published checkpoint, or take the weights of mtp. away from a local copy"
    return ExportError(told[:500], where=checkpoint, hint=hint)


@contextmanager
def head_alone(presented: str) -> Iterator[None]:
    """genai's dispatch with the builder of the head in place of that of the model."""
    replaced, ours = ALONE[presented]
    stock = getattr(builder, replaced)
    setattr(builder, replaced, ours)
    try:
        yield
    finally:
        setattr(builder, replaced, stock)
