"""Read from OpenVINO's IR what the plan asked for. The IR is XML: OpenVINO need not be installed."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from qwen_onnx.export.readback.common import provider_of, refuse

if TYPE_CHECKING:
    from qwen_onnx.catalog.schema import Readback

IR_FILE, WRAPPER_FILE = "model.xml", "model.onnx"
# element types of the IR: codes of quantised weights, with a zero point or without; floats
CODES = {"i4": (4, True), "u4": (4, False), "i8": (8, True), "u8": (8, False)}
FLOATS = {"f16": 16, "bf16": 16, "f32": 32}
# NNCF's names of what belongs to a compressed matrix
PARTS = ("/scale", "/zero_point", "/fq_weights")
# OpenVINO's own names: a matrix, and one that was converted to fp16
WEIGHTS = (".weight", ".weight_compressed")
TABLES = ("embed_tokens", "lm_head")


def read_back(folder: Path, asked: Readback) -> dict[str, Any]:
    """``compare_ir`` of ``folder``."""
    return compare_ir(read_ir(folder), asked)


def read_ir(folder: Path) -> dict[str, Any]:
    """Facts of the IR, of the ONNX model around it and of ``genai_config.json``.

    Returns:
        ``matrices``: one entry per weight matrix with name, bits, symmetric, block_size (None: one scale per channel);
        ``provider``; ``context``: the file that the EPContext node names, ``nodes``: number of nodes beside it.
    """
    import onnx

    matrices = []
    for layer in ElementTree.parse(folder / IR_FILE).iterfind("./layers/layer[@type='Const']"):
        name, data = layer.get("name", ""), layer.find("data")
        if data is None or any(part in name for part in PARTS) or not name.endswith(WEIGHTS):
            continue
        shape = [int(size) for size in data.get("shape", "").split(",") if size.strip()]
        kind = data.get("element_type", "")
        # norms are vectors; a matrix in blocks has three dimensions: outputs, blocks, inputs of a block
        if len(shape) < 2 or math.prod(shape) == max(shape):
            continue
        bits, symmetric = CODES.get(kind, (FLOATS.get(kind), True))
        block = shape[-1] if len(shape) == 3 else None
        matrices.append({"name": name, "type": kind, "bits": bits, "symmetric": symmetric, "block_size": block})
    nodes = onnx.load(str(folder / WRAPPER_FILE), load_external_data=False).graph.node
    contexts = [node for node in nodes if node.op_type == "EPContext"]
    named = [a.s.decode() for node in contexts for a in node.attribute if a.name == "ep_cache_context"]
    return {
        "matrices": matrices,
        "provider": provider_of(folder),
        "context": named[0] if len(named) == 1 else None,
        "nodes": len(nodes) - len(contexts),
    }


def compare_ir(facts: dict[str, Any], asked: Readback) -> dict[str, Any]:
    """Compare an IR with the plan.

    Returns:
        A summary for the manifest: number of matrices by (bits, block size, symmetry).

    Raises:
        ExportError: naming the differences.
    """
    faults = []
    if facts["provider"] != asked.provider:
        faults.append(f"provider is {facts['provider']}, asked {asked.provider}")
    if facts["context"] != IR_FILE or facts["nodes"]:
        faults.append(f"{WRAPPER_FILE} is not one EPContext node for {IR_FILE}")
    for matrix in facts["matrices"]:
        faults += _differences(matrix, asked)
    if not any(matrix["bits"] == asked.body_bits for matrix in facts["matrices"] if not _is_table(matrix)):
        faults.append(f"no matrix of the body has {asked.body_bits} bits")
    refuse("the IR", faults)
    kinds = Counter((item["type"], item["block_size"]) for item in facts["matrices"])
    return {
        "matrices": [{"type": kind, "block_size": block, "count": count} for (kind, block), count in kinds.items()],
        "provider": facts["provider"],
        "context": facts["context"],
    }


def _is_table(matrix: dict[str, Any]) -> bool:
    return any(part in matrix["name"] for part in TABLES)


def _differences(matrix: dict[str, Any], asked: Readback) -> list[str]:
    name, bits = matrix["name"], matrix["bits"]
    if asked.form == "float":
        return [] if bits == asked.body_bits else [f"{name} is {matrix['type']}, asked {asked.body_bits} bits"]
    allowed = {asked.head_bits} if _is_table(matrix) else {asked.body_bits, 8}
    faults = [] if bits in allowed else [f"{name} is {matrix['type']}, asked {sorted(allowed)} bits"]
    if matrix["symmetric"] != asked.symmetric:
        faults.append(f"{name}: symmetric is {matrix['symmetric']}, asked {asked.symmetric}")
    # eight bits have one scale per channel
    if bits == 4 and matrix["block_size"] != asked.block_size:
        faults.append(f"{name}: block_size is {matrix['block_size']}, asked {asked.block_size}")
    return faults
