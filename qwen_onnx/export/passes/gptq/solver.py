"""GPTQ with searched asymmetric grids, as plain functions on tensors.

GPTQ: Frantar et al. 2022, arXiv:2210.17323. The grid of each block is searched for the least error weighted by
the Hessian's diagonal, since min-max grids spend their range on weights that hardly matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

SHRINK_STEPS = 20
SHRINK = 0.02
# the smallest number of float16
SMALLEST_SCALE = 2.0**-24
# columns whose errors reach the rest of the matrix in one product
COLUMNS = 128
# LAPACK's sums depend on the number of threads: fixed, so that every machine and setting gives the same bits
FACTOR_THREADS = 4


@dataclass(frozen=True)
class Quantized:
    """A matrix on its grid; ``(codes - zeros) * scales`` gives the weights.

    Attributes:
        codes: [out, in] whole numbers below ``2**bits``.
        scales: [out, in / block].
        zeros: [out, in / block], whole numbers below ``2**bits``.
        bits: 4 or 8.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int

    def dequantize(self) -> torch.Tensor:
        """Weights [out, in] in float32."""
        block = self.codes.shape[1] // self.scales.shape[1]
        grid = self.codes.reshape(*self.scales.shape, block).float() - self.zeros[..., None]
        return (grid * self.scales[..., None]).reshape(self.codes.shape)

    def packed(self) -> dict[str, torch.Tensor]:
        """``qweight``, ``scales`` and ``qzeros`` as Olive stores them: uint8, low nibble first, along the input."""
        return {"qweight": _pack(self.codes, self.bits), "scales": self.scales, "qzeros": _pack(self.zeros, self.bits)}


def _pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    codes = values.to(torch.uint8)
    if bits == 8:
        return codes.contiguous()
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).contiguous()


def search_grid(
    weights: torch.Tensor, bits: int, importance: torch.Tensor | None = None, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row; float16 holds the scale exactly, so that it may be stored in that.

    Args:
        weights: [rows, block].
        bits: 4 or 8.
        importance: [block], weight of each column's squared error; None counts all alike.
        symmetric: every zero point is ``2**(bits - 1)``.

    Returns:
        scales [rows, 1] and zeros [rows, 1].
    """
    top = 2**bits - 1
    high, low = weights.amax(1, keepdim=True).clamp(min=0), weights.amin(1, keepdim=True).clamp(max=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = zero = torch.zeros_like(high)
    least = torch.full_like(high, torch.inf)
    for step in range(SHRINK_STEPS):
        kept = 1 - SHRINK * step
        scales = in_half((high - low) * kept / top)
        zeros = torch.full_like(low, 2 ** (bits - 1)) if symmetric else torch.round(-low * kept / scales).clamp(0, top)
        # in place: most of the time of quantising goes into this line's passes over memory
        error = _codes(weights, scales, zeros, top).sub_(zeros).mul_(scales).sub_(weights).square_()
        total = (error if importance is None else error.mul_(importance)).sum(1, keepdim=True)
        better = total < least
        least = torch.where(better, total, least)
        scale, zero = torch.where(better, scales, scale), torch.where(better, zeros, zero)
    return scale, zero


def in_half(scale: torch.Tensor) -> torch.Tensor:
    """Scales in float32 that float16 holds exactly."""
    return scale.half().float().clamp_(min=SMALLEST_SCALE)


def _on_grid(
    weights: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    codes = _codes(weights, scales, zeros, top)
    return codes, (codes - zeros) * scales


def _codes(weights: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int) -> torch.Tensor:
    return (weights / scales).round_().add_(zeros).clamp_(0, top)


def round_to_nearest(weight: torch.Tensor, bits: int, block: int, symmetric: bool = False) -> Quantized:
    """Quantise a matrix [out, in] without calibration, on searched grids; ``block`` -1 is the whole row."""
    block = weight.shape[1] if block < 0 else block
    rows = weight.reshape(-1, block)
    scales, zeros = search_grid(rows, bits, symmetric=symmetric)
    codes, _ = _on_grid(rows, scales, zeros, 2**bits - 1)
    shape = (weight.shape[0], -1)
    return Quantized(codes.reshape(weight.shape), scales.reshape(shape), zeros.reshape(shape), bits)


def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, block: int, damp: float, symmetric: bool = False
) -> Quantized:
    """Quantise a matrix so that its outputs on the calibration text change least.

    Args:
        weight: [out, in]; ``in`` is a multiple of ``block``.
        hessian: [in, in], sum of x·xᵀ over the calibration tokens.
        bits: 4 or 8.
        block: weights that share a scale; -1: all weights of a row.
        damp: added to the diagonal, as a fraction of its mean.
        symmetric: all zero points in the middle of the grid.
    """
    weight, hessian = weight.clone(), hessian.clone()
    dead = torch.diag(hessian) == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    importance = hessian.diagonal().clone()
    with _threads(FACTOR_THREADS):
        factor = torch.linalg.cholesky(hessian)
        # each is as large as the input is wide, squared: none stays longer than it is needed
        del hessian
        inverse = torch.cholesky_inverse(factor)
        del factor
        inverse = torch.linalg.cholesky(inverse, upper=True)
    codes, scales, zeros = torch.empty_like(weight), [], []
    block = weight.shape[1] if block < 0 else block
    for start in range(0, weight.shape[1], block):
        stop = start + block
        scale, zero = search_grid(weight[:, start:stop], bits, importance[start:stop], symmetric)
        for begin in range(start, stop, COLUMNS):
            end = min(begin + COLUMNS, stop)
            error = _solve_block(
                weight[:, begin:end], inverse[begin:end, begin:end], scale, zero, codes[:, begin:end], bits
            )
            weight[:, end:] -= error @ inverse[begin:end, end:]
        scales.append(scale)
        zeros.append(zero)
    return Quantized(codes, torch.cat(scales, 1), torch.cat(zeros, 1), bits)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _solve_block(
    weight: torch.Tensor,
    inverse: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    codes: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """Quantise column by column, push each error on; fills ``codes``, returns the errors [out, block]."""
    weight, errors = weight.clone(), torch.empty_like(weight)
    for column in range(weight.shape[1]):
        now = weight[:, column : column + 1]
        codes[:, column : column + 1], value = _on_grid(now, scale, zero, 2**bits - 1)
        error = (now - value) / inverse[column, column]
        weight[:, column:] -= error * inverse[column, column:]
        errors[:, column : column + 1] = error
    return errors
