"""What a build takes, before anything is downloaded: size of the artifact, disk, memory.

Formulas over the sizes of the matrices; they come from the row's ``shape`` or from a local checkpoint's
``config.json``. Each constant says where it comes from; ``python -m benchmarks.build_memory`` measures the
same figures. Measured so far, dense models and mixtures of 0.05 to 4.4 GB: artifact and disk within 1 %, disk of the
starter within 5 %; memory of build and verification within 8 %. Builds for NPUs: the artifact alone, memory of one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_onnx.catalog.passes import BATCH, LOGITS_PIECE, MATRIX_PIECE, CalibratedGptqConfig
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.catalog.sizes import (
    Dimensions,
    body_bytes,
    build_step,
    builder_bytes,
    dimensions,
    graph_bytes,
    head_bytes,
    quantize_step,
)

if TYPE_CHECKING:
    from rich.console import Console

GRAPH_BYTES_PER_LAYER = 8_700  # model.onnx: 263 kB for 30 layers, 21 kB for 2
FILES_BYTES = 25_000  # configs, logs and manifest; the rest of model.onnx
# anonymous memory of the child process with its imports: genai's builder alone; with our quantise step before it
# (2026-11-25, x86-64, Python 3.11; from eight builds of random checkpoints of 0.05 to 1.1 GB and the starter)
BUILDER_BYTES = 405_000_000
QUANTISER_BYTES = 480_000_000
# what a tokenizer takes for the calibration text, which is let go before the first layer; one of bytes has four times
# the tokens, and no file of that size
CALIBRATION_BYTES, BYTE_CALIBRATION_BYTES, BYTE_TOKENIZER = 290_000_000, 520_000_000, 100_000
# targets with an environment: the process that converts or calibrates, and its copies of the float32 weights
# (2026-11-25, the starter for the HTP: 1.65 GB)
CONVERTER_BYTES, CONVERTER_COPIES = 620_000_000, 1.6
# float32 copies of a piece of logits at once: logits, log-probabilities, their gradient, its softmax
LOGITS_COPIES = 4
# float32 copies at once in GPTQ: of the Hessian (damped, Cholesky factor, inverse), of the matrix (weights, codes,
# dequantised, temporary)
HESSIAN_COPIES = 3
MATRIX_COPIES = 4
# … in k_quant, of the piece of a matrix that it gets; beside it the head, and a tenth that its pieces leave behind;
# … in the quantiser of experts, of one expert
PIECE_COPIES = 18
TABLE_COPIES = 1.1
EXPERT_COPIES = 6
# verification, from six runs on three models (2026-11-25): its process; the three of the latency check; the tokenizer's
# file in memory; what a session takes of its weights, prepacked ones included; logits and hidden states of a window
VERIFIER_BYTES, LATENCY_BYTES, TOKENIZER_COPIES = 300_000_000, 870_000_000, 30
EXPORT_COPIES, ARTIFACT_COPIES, LATENCY_COPIES = 1.45, 1.4, 1.1
WINDOW, LOGITS_OF_DRIFT, STATES_OF_DRIFT = 512, 5.1, 22  # the default of verify.records.VerifyOptions.window


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
    found, config = dimensions(plan, source), quantize_step(plan)
    checkpoint = found.weights * found.stored
    graph = graph_bytes(found, plan)
    artifact = graph + found.tokenizer + GRAPH_BYTES_PER_LAYER * found.layers + FILES_BYTES
    fused = found.stored * found.fused * found.layers
    if config is not None:
        kept, after = _kept_bytes(found, config)
        spilled = fused * body_bytes(found, config, 4) // max(found.body * found.stored, 1)
    else:
        # layers that the builder quantised, scales of experts in half precision
        built = plan.environment is None and plan.readback.form != "float"
        kept = after = builder_bytes(found, plan, 2) if built else 0
        spilled = fused
    # Olive copies what it built; so it does with the fp32 export for export parity
    staging = max(graph + spilled, 2 * artifact)
    if verify and plan.environment is None:
        reference = 4 * found.weights + plan.context * found.head_dim * 4
        stacked = 4 * found.experts * found.layers
        staging = max(staging, artifact + reference + max(reference, fused + stacked))
    if plan.environment is not None:
        # the float32 weights once more, with a head of their own, while they are converted, and as the reference
        dense = 4 * (found.body + 2 * found.tables)
        staging = max(2 * dense, dense + 2 * artifact, dense + artifact + (dense if verify else 0))
    return Estimate(
        artifact=artifact,
        download=0 if source and source.is_dir() else checkpoint + found.tokenizer,
        kept=kept,
        quantised=after,
        staging=staging,
        disk=max(kept, after + staging),
        memory=_memory(found, plan, config),
        verification=_verification(found, artifact),
        exact=found.exact,
    )


def _kept_bytes(found: Dimensions, config: CalibratedGptqConfig) -> tuple[int, int]:
    """Peak of the quantiser's work folder, and what is left of it when the graph is built."""
    quantised = body_bytes(found, config, 4) + head_bytes(found, config, 4) + 4 * found.tables
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


def _memory(found: Dimensions, plan: Plan, config: CalibratedGptqConfig | None) -> int:
    """The largest of the stages' needs, beside the process: the builder's, and those of the quantise step."""
    if plan.environment is not None:
        dense = 4 * (found.body + 2 * found.tables)
        others = _memory(found, plan.model_copy(update={"environment": None}), config) if config else 0
        return max(others, CONVERTER_BYTES + int(CONVERTER_COPIES * dense))
    # head and embedding are converted whole, when they are quantised and when they are saved
    build = [4 * found.largest, 0 if found.tied and config else int(4 * TABLE_COPIES * found.tables)]
    if config is None:
        piece = 4 * PIECE_COPIES * MATRIX_PIECE if build_step(plan).precision == "int4" else 0
        return BUILDER_BYTES + max(max(build) + piece, 4 * EXPERT_COPIES * found.expert)
    byte_tokenizer = found.tokenizer < BYTE_TOKENIZER
    stages = [*build, BYTE_CALIBRATION_BYTES if byte_tokenizer else CALIBRATION_BYTES]
    stages.append(4 * (HESSIAN_COPIES * found.widest**2 + MATRIX_COPIES * found.largest))
    # the product x·xᵀ of a batch, beside the batch's activations: four as wide as the MLP, six hidden states
    tokens = BATCH * config.window
    stages.append(4 * (found.widest**2 + tokens * (4 * found.widest + 6 * found.hidden)))
    if config.int8_share:
        stages.append(4 * LOGITS_COPIES * min(config.window * found.vocabulary, LOGITS_PIECE))
    return QUANTISER_BYTES + max(stages)


def _verification(found: Dimensions, artifact: int) -> int:
    """The larger of drift (PyTorch, fp32 export and artifact read one window) and latency (three processes)."""
    weights = 4 * found.weights
    # PyTorch reads float32 weights from the mapped file, but stacks experts
    loaded = 0 if found.stored == 4 and not found.experts else weights
    tokenizers = TOKENIZER_COPIES * found.tokenizer
    window = 4 * WINDOW * (LOGITS_OF_DRIFT * found.vocabulary + STATES_OF_DRIFT * found.widest)
    drift = VERIFIER_BYTES + loaded + EXPORT_COPIES * weights + ARTIFACT_COPIES * artifact + window
    return int(tokenizers + max(drift, LATENCY_BYTES + loaded + LATENCY_COPIES * artifact))


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
    if plan.environment:
        console.print("measured so far for NPU targets: artifact within 3 %; disk and memory are rough")
    else:
        console.print("measured so far: artifact within 1 %, disk within 5 %, memory within 8 %")
    if not found.exact:
        console.print("upper bounds: the row does not say how large every matrix is; --source CHECKPOINT does")
    print(json.dumps(asdict(found)))
