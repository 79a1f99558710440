"""GPTQ on several grids at once, refinement, and the damage that a grid does, as plain functions on tensors.

GPTQ: Frantar et al. 2022, arXiv:2210.17323. Here the Hessian is weighted by the loss: a token counts by the squared
gradient at the matrix's outputs, so that errors go where the model's answer does not notice them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Self

import torch

from qwen_onnx.export.passes.fisher_gptq.options import FLOAT_BITS
from qwen_onnx.export.passes.gptq.solver import Quantized, in_half, search_grid

SCALE_BYTES = 2  # of float16
# columns whose errors reach the rest of the matrix in one product; every block divides them
COLUMNS = 64
# a scale that least squares moves further than this has met a singular system
LEAST_CHANGE, MOST_CHANGE = 0.7, 1.4
# numbers of the scales' normal equations that are solved together
EQUATIONS = 1 << 22


class Grid(NamedTuple):
    """How finely a matrix is rounded: ``bits`` of a code, ``block`` weights of a row that share a scale.

    16 bits are no grid: the matrix stays as it is.
    """

    bits: int
    block: int
    symmetric: bool = False

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def name(self) -> str:
        """``<bits>x<block>``, and ``s`` without zero points."""
        return f"{self.bits}x{self.block}{'s' * self.symmetric}"

    @classmethod
    def of(cls, name: str) -> Self:
        """The grid of a name."""
        bits, block = name.removesuffix("s").split("x")
        return cls(int(bits), int(block), name.endswith("s"))


def damped(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """A copy with ``damp`` times the mean of the diagonal on it, and ones for inputs that never were anything."""
    result = hessian.clone()
    dead = result.diagonal() <= 0
    result[dead, dead] = 1
    result.diagonal().add_(damp * result.diagonal().mean())
    return result


def solve(weight: torch.Tensor, hessian: torch.Tensor, grids: Sequence[Grid]) -> list[Quantized]:
    """Quantise a matrix on each of the grids; the inverse of the Hessian serves all of them.

    Args:
        weight: [out, in]; blocks divide ``in``.
        hessian: [in, in], positive definite (``damped``).
    """
    rows, inputs = weight.shape
    importance = hessian.diagonal()
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    steps = inverse.diagonal().tolist()
    # inputs first: a column of the matrix, of every grid, is then a row of memory
    rest = weight.T.repeat(1, len(grids))
    codes = torch.empty_like(rest)
    scale, zero = torch.empty(rest.shape[1]), torch.empty(rest.shape[1])
    top = torch.cat([torch.full((rows,), float(grid.top)) for grid in grids])
    parts = [slice(number * rows, (number + 1) * rows) for number in range(len(grids))]
    scales: list[list[torch.Tensor]] = [[] for _ in grids]
    zeros: list[list[torch.Tensor]] = [[] for _ in grids]
    for begin in range(0, inputs, COLUMNS):
        end = min(begin + COLUMNS, inputs)
        errors = torch.empty(end - begin, rest.shape[1])
        for column in range(begin, end):
            for number, grid in enumerate(grids):
                if column % grid.block == 0:
                    block = slice(column, column + grid.block)
                    found = _grid(rest[block, parts[number]].T, grid, importance[block])
                    scale[parts[number]], zero[parts[number]] = found
                    scales[number].append(found[0])
                    zeros[number].append(found[1])
            now = rest[column]
            code = torch.minimum(torch.div(now, scale).add_(zero).round_().clamp_(min=0), top)
            codes[column] = code
            error = code.sub_(zero).mul_(scale).sub_(now).div_(-steps[column])
            rest[column + 1 : end].addr_(inverse[column, column + 1 : end], error, alpha=-1)
            errors[column - begin] = error
        rest[end:].addmm_(inverse[begin:end, end:].T, errors, alpha=-1)
    return [
        Quantized(
            codes[:, part].T.contiguous(), torch.stack(scales[number], 1), torch.stack(zeros[number], 1), grid.bits
        )
        for number, (grid, part) in enumerate(zip(grids, parts, strict=True))
    ]


def _grid(weights: torch.Tensor, grid: Grid, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale, zero = search_grid(weights.contiguous(), grid.bits, importance, grid.symmetric)
    return scale[:, 0], zero[:, 0]


def nearest(weight: torch.Tensor, importance: torch.Tensor, grid: Grid) -> Quantized:
    """Quantise a matrix [out, in] by rounding, on grids searched with the ``importance`` [in] of the inputs."""
    rows, inputs = weight.shape
    scales, zeros = [], []
    for begin in range(0, inputs, grid.block):
        block = slice(begin, begin + grid.block)
        scale, zero = _grid(weight[:, block], grid, importance[block])
        scales.append(scale)
        zeros.append(zero)
    scale, zero = torch.stack(scales, 1), torch.stack(zeros, 1)
    blocks = weight.reshape(rows, -1, grid.block)
    codes = (blocks / scale[..., None]).round_().add_(zero[..., None]).clamp_(0, grid.top)
    return Quantized(codes.reshape(rows, inputs), scale, zero, grid.bits)


def refine(found: Sequence[Quantized], weight: torch.Tensor, hessian: torch.Tensor, rounds: int) -> list[Quantized]:
    """Move codes and scales in turn to where the weighted error is less; it falls with every round.

    Args:
        weight: [out, in], what each of ``found`` stands for.
        hessian: [in, in], positive definite.
        rounds: each moves every code to its best place with all others fixed, then solves every row for its scales.
    """
    for _ in range(rounds):
        found = [replace(one, scales=_scales(one, weight, hessian)) for one in _moved(found, weight, hessian)]
    return _moved(found, weight, hessian) if rounds else list(found)


def on_grids(weight: torch.Tensor, hessian: torch.Tensor, grids: Sequence[Grid], rounds: int) -> list[Quantized]:
    """A matrix on each of the grids: solved and refined, and rounded where 8 bits do not need it.

    Args:
        grids: those of 8 bits last.
        rounds: of refinement.
    """
    fine = [grid for grid in grids if grid.bits < 8]
    found = refine(solve(weight, hessian, fine), weight, hessian, rounds)
    return found + [nearest(weight, hessian.diagonal(), grid) for grid in grids if grid.bits == 8]


def _moved(found: Sequence[Quantized], weight: torch.Tensor, hessian: torch.Tensor) -> list[Quantized]:
    """Every code at its best place; the columns of all grids move in one step, as in ``solve``."""
    rows, inputs = weight.shape
    # one scale for each code of the narrowest blocks
    block = min(inputs // one.scales.shape[1] for one in found)
    codes = torch.cat([one.codes.T for one in found], 1)
    scales = torch.cat([_repeated(one.scales, inputs // block).T for one in found], 1)
    top = torch.cat([torch.full((rows,), float(2**one.bits - 1)) for one in found])
    steps = hessian.diagonal().reciprocal().neg_().tolist()
    slope = hessian @ torch.cat([(one.dequantize() - weight).T for one in found], 1)
    for begin in range(0, inputs, COLUMNS):
        end = min(begin + COLUMNS, inputs)
        inner, near = hessian[begin:end, begin:end].contiguous(), slope[begin:end]
        moves = torch.empty_like(near)
        for place in range(end - begin):
            scale, code = scales[(begin + place) // block], codes[begin + place]
            best = torch.addcdiv(code, near[place], scale, value=steps[begin + place])
            best = torch.minimum(best.round_().clamp_(min=0), top)
            torch.sub(best, code, out=moves[place]).mul_(scale)
            codes[begin + place] = best
            near.addr_(inner[place], moves[place])
        slope[:begin].addmm_(hessian[:begin, begin:end], moves)
        slope[end:].addmm_(hessian[end:, begin:end], moves)
    parts = torch.split(codes.T, rows)
    return [replace(one, codes=part.contiguous()) for one, part in zip(found, parts, strict=True)]


def _repeated(scales: torch.Tensor, blocks: int) -> torch.Tensor:
    return scales.repeat_interleave(blocks // scales.shape[1], 1)


def _scales(found: Quantized, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Scales [out, blocks] of least weighted error for the codes as they are."""
    blocks = found.scales.shape[1]
    step = max(EQUATIONS // blocks**2, 1)
    pieces = [slice(begin, begin + step) for begin in range(0, len(weight), step)]
    return torch.cat([_scales_of(found, weight, hessian, piece) for piece in pieces])


def _scales_of(found: Quantized, weight: torch.Tensor, hessian: torch.Tensor, rows: slice) -> torch.Tensor:
    before = found.scales[rows]
    count, blocks = before.shape
    grid = found.codes[rows].reshape(count, blocks, -1) - found.zeros[rows][..., None]
    target = (weight[rows] @ hessian).reshape(count, blocks, -1)
    wanted = (target * grid).sum(-1)
    products = torch.empty(count, blocks, blocks)
    for number in range(blocks):
        size = grid.shape[2]
        turned = grid[:, number] @ hessian[number * size : (number + 1) * size]
        products[:, number] = (turned.reshape(count, blocks, -1) * grid).sum(-1)
    diagonal = products.diagonal(dim1=1, dim2=2)
    diagonal.add_(1e-4 * diagonal.mean(1, keepdim=True) + 1e-12)
    after = torch.linalg.solve(products, wanted[..., None])[..., 0]
    kept = (after > LEAST_CHANGE * before) & (after < MOST_CHANGE * before)
    return in_half(torch.where(kept, after, before))


def damage(found: Quantized, weight: torch.Tensor, hessian: torch.Tensor, shares: torch.Tensor, tokens: int) -> float:
    """How much the KL divergence per token grows to second order, when ``found`` stands for ``weight`` alone.

    Args:
        hessian: [in, in], of ``tokens`` tokens, each weighted by its squared gradient; not damped.
        shares: [out], part of that squared gradient which each output has.
    """
    error = found.dequantize() - weight
    rows = (error @ hessian).mul_(error).sum(1)
    return 0.5 * float(rows @ shares) / tokens


def stored_bytes(weight: torch.Tensor, grid: Grid) -> int:
    """Bytes of codes, of scales in half precision and of zero points."""
    rows, inputs = weight.shape
    if grid.bits == FLOAT_BITS:
        return rows * inputs * FLOAT_BITS // 8
    blocks, zero = inputs // grid.block, 0 if grid.symmetric else grid.bits
    return rows * (inputs * grid.bits + blocks * (8 * SCALE_BYTES + zero)) // 8
