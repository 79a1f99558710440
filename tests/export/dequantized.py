"""Weights of an int4 or int8 graph as floats, put back into the PyTorch model.

Written from the operators' definitions (MatMulNBits, GatherBlockQuantized, QMoE), not with the code that packed them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

# name of a matrix in genai's graph → its modules in transformers, in the order of their rows
MODULES = {
    "attn/qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn/q_proj": ("self_attn.q_proj",),
    "attn/k_proj": ("self_attn.k_proj",),
    "attn/v_proj": ("self_attn.v_proj",),
    "attn/o_proj": ("self_attn.o_proj",),
    "linear_attn/qkv_proj": ("linear_attn.in_proj_qkv",),
    "linear_attn/z_proj": ("linear_attn.in_proj_z",),
    "linear_attn/out_proj": ("linear_attn.out_proj",),
    "mlp/gate_proj": ("mlp.gate_proj", "mlp.shared_expert.gate_proj"),
    "mlp/up_proj": ("mlp.up_proj", "mlp.shared_expert.up_proj"),
    "mlp/down_proj": ("mlp.down_proj", "mlp.shared_expert.down_proj"),
}


@torch.no_grad()
def with_weights_of(model: Any, onnx_file: Path) -> int:
    """Replace the weights of a transformers ``model`` by those of the graph; returns how many matrices there were."""
    loaded = onnx.load(str(onnx_file))
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in loaded.graph.initializer}
    parameters = dict(model.named_parameters())
    count = 0
    for node in loaded.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "MatMulNBits":
            matrix = _matrix(node, attributes, arrays)
            if not _put_grouped(parameters, node.name, matrix, getattr(model.config, "linear_num_key_heads", 1)):
                _put_matrix(parameters, node.name, matrix)
            count += 1
        elif node.op_type == "QMoE":
            count += _put_experts(parameters, node, attributes, arrays)
    return count


def _codes(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes; the low nibble comes first."""
    if bits == 8:
        return packed.astype(np.float32)
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1).astype(np.float32)


def _matrix(node: Any, attributes: dict[str, Any], arrays: dict[str, np.ndarray]) -> torch.Tensor:
    """[outputs, inputs] of a MatMulNBits."""
    bits, block, rows, columns = (attributes[name] for name in ("bits", "block_size", "N", "K"))
    codes = _codes(arrays[node.input[1]].reshape(rows, -1), bits)[:, :columns]
    scales = arrays[node.input[2]].reshape(rows, -1).astype(np.float32)
    zeros: Any = np.full_like(scales, 2 ** (bits - 1))
    if len(node.input) > 3 and node.input[3]:
        zeros = _codes(arrays[node.input[3]].reshape(rows, -1), bits)[:, : scales.shape[1]]
    wide = [np.repeat(part, block, axis=1)[:, :columns] for part in (zeros, scales)]
    return torch.tensor((codes - wide[0]) * wide[1])


def _put_grouped(parameters: dict[str, torch.Tensor], name: str, matrix: torch.Tensor, groups: int) -> bool:
    """Qwen3-Next keeps query, key, value and gate of a key head together: put two matrices of Qwen3.5 back in there."""
    layer = re.search(r"layers\.(\d+)/linear_attn/(qkv|z)_proj", name)
    fused = parameters.get(f"model.layers.{layer[1]}.linear_attn.in_proj_qkvz.weight") if layer else None
    if layer is None or fused is None:
        return False
    # as many value channels as gate channels, so the gate is as wide as the value
    total = len(fused) // groups
    wide = len(matrix) // groups if layer[2] == "z" else total - len(matrix) // groups
    narrow = (total - 2 * wide) // 2
    rows = fused.view(groups, total, -1)
    if layer[2] == "z":
        rows[:, total - wide :] = matrix.view(groups, wide, -1)
        return True
    start = 0
    for first, size in ((0, narrow), (narrow, narrow), (2 * narrow, wide)):
        rows[:, first : first + size] = matrix[start : start + groups * size].view(groups, size, -1)
        start += groups * size
    return True


def _put_matrix(parameters: dict[str, torch.Tensor], name: str, matrix: torch.Tensor) -> None:
    if "lm_head" in name:
        # tied models have no parameter of that name: the head is the embedding
        modules = ["lm_head" if "lm_head.weight" in parameters else "model.embed_tokens"]
    else:
        layer = re.search(r"layers\.(\d+)", name)
        key = next(key for key in MODULES if f"/{key}/" in name)
        assert layer, name
        modules = [f"model.layers.{layer[1]}.{module}" for module in MODULES[key]]
        modules = [module for module in modules if f"{module}.weight" in parameters]
    start = 0
    for module in modules:
        parameter = parameters[f"{module}.weight"]
        parameter.data = matrix[start : start + len(parameter)].clone()
        start += len(parameter)
    assert start == len(matrix), f"{name} has {len(matrix)} rows, {modules} take {start}"


def _put_experts(
    parameters: dict[str, torch.Tensor], node: Any, attributes: dict[str, Any], arrays: dict[str, np.ndarray]
) -> int:
    """Both matrices of every expert; the operator wants the rows of gate and up in turns."""
    layer = re.search(r"layers\.(\d+)", node.name)
    assert layer, node.name
    bits, block = attributes["expert_weight_bits"], attributes["block_size"]
    for first, name in ((2, "gate_up_proj"), (5, "down_proj")):
        codes = _codes(arrays[node.input[first]], bits) - 2 ** (bits - 1)
        weights = torch.tensor(codes * np.repeat(arrays[node.input[first + 1]], block, axis=-1))
        if name == "gate_up_proj":
            weights = torch.cat([weights[:, 0::2], weights[:, 1::2]], dim=1)
        parameter = parameters[f"model.layers.{layer[1]}.mlp.experts.{name}"]
        assert parameter.shape == weights.shape
        parameter.data = weights
    return 2
