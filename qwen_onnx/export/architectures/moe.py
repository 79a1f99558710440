"""Qwen2-MoE and Qwen3-MoE for genai's builder, and routing in float for every mixture of experts.

genai 0.18 knows neither architecture (genai #1433), but its Qwen3.5-MoE builder has the parts: the router, the
experts packed for the fused operators MoE (float) and QMoE (int4, int8), the shared expert with its sigmoid gate.
They are joined here with its dense Qwen2 and Qwen3 builders.
"""

from __future__ import annotations

from typing import Any

from qwen_onnx.errors import ExportError
from qwen_onnx.export.architectures.linear_attention import CodedProjections
from qwen_onnx.export.architectures.stock import Qwen3Model, Qwen35MoEModel, Qwen35MoETextModel, QwenModel
from qwen_onnx.export.experts import zero_points_of


class FloatRouting:
    """Routers and shared-expert gates stay float: they are 0.1 % of the weights and choose what the others do.

    The stock Qwen3.5-MoE builder rounds them to int4 like any other matrix.
    """

    def make_moe_router(self: Any, layer_id: int, moe: Any, root_input: str) -> None:
        """Router logits of shape [tokens, experts]."""
        self.exclude_node_from_quantization(f"/model/layers.{layer_id}/moe/router/MatMul")
        self.exclude_node_from_quantization(f"/model/layers.{layer_id}/shared_expert_gate/MatMul")
        Qwen35MoETextModel.make_moe_router(self, layer_id, moe, root_input)

    def make_qmoe_op(self: Any, name: str, **inputs: Any) -> None:
        """genai's own, given the zero points of experts that came in codes."""
        for number in (1, 2):
            zeros = zero_points_of(inputs[f"weight{number}"])
            if zeros in self.model.graph.initializers:
                inputs[f"zero_points{number}"] = zeros
        super().make_qmoe_op(name, **inputs)  # type: ignore[misc]


class SparseExperts(FloatRouting):
    """Mixin: experts instead of the dense MLP.

    Raises:
        ExportError: some layers keep a dense MLP (no published Qwen has such layers).
    """

    def __init__(self: Any, config: Any, *rest: Any) -> None:
        super().__init__(config, *rest)  # type: ignore[call-arg]
        require_sparse_layers(config)
        self.moe_attrs.update(
            activation_type="swiglu", swiglu_fusion=1, normalize_routing_weights=bool(config.norm_topk_prob)
        )
        self.moe_intermediate_size = config.moe_intermediate_size
        self.shared_expert_intermediate_size = getattr(config, "shared_expert_intermediate_size", None)

    get_moe_module = Qwen35MoETextModel.get_moe_module
    make_moe_preprocessing = Qwen35MoETextModel.make_moe_preprocessing
    make_shared_expert = Qwen35MoETextModel.make_shared_expert


def require_sparse_layers(config: Any) -> None:
    """ExportError when not every layer has experts: the builders here would look for some in a dense MLP."""
    if getattr(config, "decoder_sparse_step", 1) != 1 or getattr(config, "mlp_only_layers", None):
        raise ExportError(
            "the checkpoint mixes dense and sparse layers, which this exporter does not build",
            where="config.json: decoder_sparse_step, mlp_only_layers",
            hint="choose a model in which every layer has experts: qwen-onnx list",
        )


class Qwen2MoEModel(SparseExperts, QwenModel):  # type: ignore[misc]
    """Qwen1.5-MoE and Qwen2-MoE: routed experts plus one shared expert behind a sigmoid gate."""

    make_moe_subgraph = Qwen35MoETextModel.make_moe_subgraph


class Qwen3MoEModel(SparseExperts, Qwen3Model):  # type: ignore[misc]
    """Qwen3-MoE: routed experts only."""

    def make_moe_subgraph(self: Any, layer_id: int, moe: Any, root_input: str) -> None:
        """The fused operator, its output [batch, tokens, hidden] goes to the next residual addition."""
        base, names = f"/model/layers.{layer_id}/moe", self.make_moe_expert_names(layer_id)
        quantised = self.moe_attrs["op_type"] == "QMoE"
        operator = f"{base}/{self.moe_attrs['op_type']}"
        self.make_moe_op(
            operator,
            root_input=root_input,
            router_probs=f"{base}/router/Reshape/output_0",
            weight1=names["gate_up_weight"],
            scales1=names["gate_up_scales"] if quantised else "",
            bias1=names["gate_up_bias"],
            weight2=names["down_weight"],
            scales2=names["down_scales"] if quantised else "",
            bias2=names["down_bias"],
        )
        self.layernorm_attrs["skip_input"] = f"{operator}/output_0"


class Qwen35MoETextFloatRouting(FloatRouting, CodedProjections, Qwen35MoETextModel):  # type: ignore[misc]
    """The stock decoder of Qwen3.5-MoE but for the precision of its routers and the names of its projections."""


class Qwen35MoEFloatRouting(Qwen35MoEModel):  # type: ignore[misc]
    """genai wraps its Qwen3.5 decoders in a class that may add a head for multi-token prediction."""

    def get_decoder_model_class(self) -> type:
        """The decoder that this class wraps."""
        return Qwen35MoETextFloatRouting
