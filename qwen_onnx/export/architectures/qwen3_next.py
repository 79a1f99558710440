"""Qwen3-Next for genai's builder, which knows its successor Qwen3.5-MoE only.

The two compute the same; Qwen3-Next stores the projections of its linear attention fused and grouped by key head. They
are taken apart layer by layer while the graph is built, so that no second copy of the checkpoint is made.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from qwen_onnx.errors import ExportError
from qwen_onnx.export.architectures.linear_attention import CodedProjections
from qwen_onnx.export.architectures.moe import FloatRouting, require_sparse_layers
from qwen_onnx.export.architectures.stock import Qwen35MoEModel, Qwen35MoETextModel
from qwen_onnx.export.passes.genai_builder.mapped_model import CodedLinear


class Qwen3NextTextModel(FloatRouting, CodedProjections, Qwen35MoETextModel):  # type: ignore[misc]
    """The decoder.

    Raises:
        ExportError: dense layers between the sparse ones, or routing weights that are not normalised.
    """

    def __init__(self, config: Any, *rest: Any) -> None:
        require_sparse_layers(config)
        if not config.norm_topk_prob:
            raise ExportError("Qwen3-Next is built for normalised routing weights", where="config.json: norm_topk_prob")
        # Qwen3.5 turns by three axes of positions, which are one and the same for text: any partition will do
        pairs = int(config.head_dim * config.rope_parameters["partial_rotary_factor"]) // 2
        config.rope_parameters["mrope_section"] = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
        super().__init__(config, *rest)

    def make_linear_attention_input_proj(self, layer_id: int, attention: Any, root_input: str) -> Any:
        """genai's own, given the projections under the names and in the order of Qwen3.5."""
        return super().make_linear_attention_input_proj(layer_id, split_projections(attention), root_input)


class Qwen3NextModel(Qwen35MoEModel):  # type: ignore[misc]
    """What create_model constructs."""

    def get_decoder_model_class(self) -> type:
        """The decoder that this class wraps."""
        return Qwen3NextTextModel


def split_projections(attention: Any) -> Any:
    """The inputs of a gated delta net (Qwen3NextGatedDeltaNet of transformers) as Qwen3.5 names them.

    ``in_proj_qkvz`` has, per key head, the rows of its query, its key, and the values and output gates of its value
    heads; ``in_proj_ba`` likewise beta and decay. Qwen3.5 wants all queries, then all keys, and so on.
    """
    groups, key_size = attention.num_k_heads, attention.head_k_dim
    values = attention.num_v_heads // groups
    wide = values * attention.head_v_dim
    query, key, value, gate = _grouped(groups, [key_size, key_size, wide, wide])
    beta, decay = _grouped(groups, [values, values])
    return SimpleNamespace(
        in_proj_qkv=_picked(attention.in_proj_qkvz, torch.cat([query, key, value])),
        in_proj_z=_picked(attention.in_proj_qkvz, gate),
        in_proj_b=_picked(attention.in_proj_ba, beta),
        in_proj_a=_picked(attention.in_proj_ba, decay),
        conv1d=attention.conv1d,
    )


def _grouped(groups: int, sizes: list[int]) -> list[torch.Tensor]:
    """Places of the rows of each kind, all groups together."""
    rows = torch.arange(groups * sum(sizes)).view(groups, -1)
    return [part.flatten() for part in torch.split(rows, sizes, dim=1)]


def _picked(projection: Any, rows: torch.Tensor) -> torch.nn.Module:
    if isinstance(projection, CodedLinear):
        return projection.picked(rows)
    weight = projection.weight[rows]
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear
