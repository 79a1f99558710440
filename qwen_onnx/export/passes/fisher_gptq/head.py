"""The head, and the embedding that shares it: GPTQ on the hidden states behind the last layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from qwen_onnx.export.gradients import Gradients
from qwen_onnx.export.passes.fisher_gptq.kernels import held, kernel_of
from qwen_onnx.export.passes.fisher_gptq.options import FLOAT_BITS, FisherGptqOptions
from qwen_onnx.export.passes.fisher_gptq.sizes import head_grid
from qwen_onnx.export.passes.fisher_gptq.solver import Grid, damped, nearest, solve, stored_bytes
from qwen_onnx.export.passes.gptq.solver import Quantized
from qwen_onnx.export.progress import Steps
from qwen_onnx.export.skeleton import EMBEDDING, NORM
from qwen_onnx.export.weights import create_safetensors

HEAD_STEP = "head"
# of a tensor: its type and shape
Form = tuple[torch.dtype, tuple[int, ...]]
EMPTY: Mapping[str, Form] = MappingProxyType({})
CONTAINER = 8  # bits of the kernel and of the embedding's operator
# weights that are solved at once: enough that rows, not the steps from column to column, take the time
PIECE = 1 << 24
# positions whose logits are compared
SAMPLES = 256
# lines of progress
PARTS = 10


@torch.no_grad()
def quantize_head(run: Gradients, ids: torch.Tensor, config: FisherGptqOptions) -> None:
    """Leave ``head.safetensors``: head, embedding and the last norm; with the head's ``bytes`` and ``damage``.

    Args:
        ids: [windows, tokens].
    """
    skeleton, work, name = run.skeleton, run.work, f"{HEAD_STEP}.safetensors"
    if work.finished(HEAD_STEP) is not None:
        return
    run.forward(ids)
    weights = skeleton.weights
    head, grid = weights.tensor(skeleton.head_name), head_grid(config)
    copied = dict.fromkeys([EMBEDDING, *weights.names(f"{NORM}.")])
    if grid.bits == FLOAT_BITS:
        _create(run, {**copied, skeleton.head_name: None})
        work.commit(HEAD_STEP, [name], {"bytes": stored_bytes(head, grid), "damage": 0.0})
        return
    normed = run.normed(ids)
    states = normed.reshape(-1, normed.shape[-1])
    hessian = damped(states.T @ states, config.damp)
    one_row = _parts(_quantized(head[:1].float(), hessian, grid), config)
    rows_of = {f"lm_head.{part}": (row.dtype, (head.shape[0], row.shape[1])) for part, row in one_row.items()}
    file = _create(run, copied, rows_of)
    step = max(PIECE // head.shape[1], 1)
    sampled = states[:: max(len(states) // SAMPLES, 1)]
    logits = torch.empty(2, len(sampled), head.shape[0])
    starts = range(0, head.shape[0], step)
    said = Steps("the head: part", min(PARTS, len(starts)))
    for count, begin in enumerate(starts, 1):
        rows = slice(begin, min(begin + step, head.shape[0]))
        exact = head[rows].float()
        found = _quantized(exact, hessian, grid)
        for part, value in _parts(found, config).items():
            file[f"lm_head.{part}"][rows] = value
        logits[0, :, rows], logits[1, :, rows] = sampled @ exact.T, sampled @ found.dequantize().T
        tenths = count * said.total // len(starts)
        if tenths > said.done:
            said.step(tenths)
    work.commit(HEAD_STEP, [name], {"bytes": stored_bytes(head, grid), "damage": _divergence(*logits)})


def _create(run: Gradients, copied: Iterable[str], more: Mapping[str, Form] = EMPTY) -> dict[str, torch.Tensor]:
    """``head.safetensors`` with ``copied`` tensors of the checkpoint in float32, and ``more`` to fill in."""
    weights = run.skeleton.weights
    layout: dict[str, Form] = {key: (torch.float32, tuple(weights.tensor(key).shape)) for key in copied}
    file = create_safetensors(run.work.temporary(f"{HEAD_STEP}.safetensors"), {**layout, **more})
    for key in layout:
        file[key].copy_(weights.tensor(key))
    return file


def _quantized(rows: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> Quantized:
    if grid.bits == CONTAINER:
        return nearest(rows, hessian.diagonal(), grid)
    return solve(rows, hessian, [grid])[0]


def _parts(found: Quantized, config: FisherGptqOptions) -> dict[str, torch.Tensor]:
    grid = head_grid(config)
    # the embedding's operator has 8 bits as the head's kernel has, whatever the body's kernel
    packed = replace(found, bits=CONTAINER).packed()
    return held(packed, grid, kernel_of(grid, config))


def _divergence(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """Mean KL divergence of logits [positions, vocabulary], a position at a time."""
    total = 0.0
    for one, other in zip(teacher, student, strict=True):
        truth = one.log_softmax(-1)
        total += float((truth.exp() * (truth - other.log_softmax(-1))).sum())
    return total / len(teacher)
