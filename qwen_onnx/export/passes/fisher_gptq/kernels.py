"""What holds the codes of a grid: a matrix of 4 or 8 bits, as ONNX Runtime has kernels for.

ONNX Runtime rounds activations to 8 bits in the blocks of the matrix that they meet, so that finer blocks mean answers
nearer to the model's: blocks of 32 cost no time over those of 64, blocks of 16 a tenth of decoding. Neighbouring blocks
then repeat a scale and a zero point, which ``PackWeights`` stores once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from qwen_onnx.export.passes.fisher_gptq.options import KERNEL_BLOCK, MIXED_BLOCK, FisherGptqOptions
from qwen_onnx.export.passes.fisher_gptq.solver import Grid
from qwen_onnx.export.passes.pack_weights.options import PLANE_BYTES, WIDTHS


class Kernel(NamedTuple):
    """A matrix in the graph: ``bits`` of a code, ``block`` weights of a row that have a scale."""

    bits: int
    block: int


def usual_kernel(config: FisherGptqOptions) -> Kernel:
    """What most matrices get; the others are named one by one."""
    return Kernel(8, KERNEL_BLOCK) if config.kernel == "int8" else Kernel(4, config.group_size)


def kernel_of(grid: Grid, config: FisherGptqOptions) -> Kernel:
    """What holds codes on ``grid``."""
    if config.kernel == "int8":
        return Kernel(8, KERNEL_BLOCK)
    if grid.bits == 4:
        return Kernel(4, grid.block)
    return Kernel(8, grid.block if config.activation_bits > 8 else min(grid.block, MIXED_BLOCK))


def plane_bytes(grid: Grid, kernel: Kernel) -> int:
    """What the nodes that put a matrix together, from planes or from scales stored once, add to the graph file."""
    return 0 if kernel == grid[:2] else PLANE_BYTES * len(WIDTHS.get(grid.bits, (8,)))


def held(packed: Mapping[str, torch.Tensor], grid: Grid, kernel: Kernel) -> dict[str, torch.Tensor]:
    """``qweight``, ``scales`` and ``qzeros`` of a matrix on ``grid``, with one scale for each block of ``kernel``.

    A symmetric one has no ``qzeros``: all are the middle of the grid.
    """
    if grid.symmetric:
        return {part: value for part, value in packed.items() if part != "qzeros"}
    times = grid.block // kernel.block
    if times == 1:
        return dict(packed)
    # finer blocks are those of 8 bits: zero points have a byte each
    finer = {part: packed[part].repeat_interleave(times, 1) for part in ("scales", "qzeros")}
    return {**packed, **finer}
