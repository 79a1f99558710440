"""Weights that become float32 a few rows at a time, while they are used: from the checkpoint, or from codes of a graph.

A layer of 72B parameters is 3.5 GB in float32, and a mixture's is more. Here neither is ever whole in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from qwen_onnx.export.weights import row_pieces

SIGN_BITS = 0x88  # of the two codes in a byte: turned, a signed code is an unsigned one with the zero point 8


class Matrix(Protocol):
    """A matrix of ``shape`` (outputs, inputs)."""

    shape: tuple[int, int]

    def rows(self, index: slice | torch.Tensor) -> torch.Tensor:
        """float32 [rows, inputs]."""
        ...


class Stored:
    """A matrix as the checkpoint stores it, rounded to the type that the graph gives floats.

    Args:
        tensor: [outputs, inputs], mapped.
        number: float32 or float16.
    """

    def __init__(self, tensor: torch.Tensor, number: torch.dtype = torch.float32) -> None:
        self.tensor, self.number = tensor, number
        self.shape = (tensor.shape[0], tensor.shape[1])

    def rows(self, index: slice | torch.Tensor) -> torch.Tensor:
        """See ``Matrix``."""
        return rounded(self.tensor[index], self.number)


def rounded(tensor: torch.Tensor, number: torch.dtype) -> torch.Tensor:
    """``tensor`` in float32, after a trip through ``number``; the same memory where nothing has to change."""
    return tensor.to(number).float() if number != torch.float32 else tensor.float()


class Packed:
    """A matrix of codes with a scale and a zero point per block of inputs, as MatMulNBits and QMoE define it.

    Args:
        codes: uint8 [outputs, ...]; of 4 bits the low half of a byte comes first.
        scales: [outputs, blocks].
        zeros: uint8 [outputs, ...], packed as the codes; None for the middle of the range.
        bits: 4 or 8.
        inputs: columns; codes beyond are padding.
        signed: codes of 4 bits are, as DequantizeLinear of INT4 has them.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        bits: int,
        inputs: int,
        *,
        signed: bool = False,
    ) -> None:
        self.codes, self.scales, self.bits, self.signed = codes.flatten(1), scales, bits, signed
        self.zeros = None if zeros is None else zeros.reshape(len(scales), -1)
        self.shape = (len(codes), inputs)

    def rows(self, index: slice | torch.Tensor) -> torch.Tensor:
        """See ``Matrix``."""
        scales = self.scales[index].float()
        packed = self.codes[index] ^ SIGN_BITS if self.signed else self.codes[index]
        codes = unpacked(packed, self.bits).view(*scales.shape, -1)
        if self.zeros is None:
            codes -= 2 ** (self.bits - 1)
        else:
            codes -= unpacked(self.zeros[index], self.bits)[:, : scales.shape[1], None]
        codes *= scales[:, :, None]
        return codes.flatten(1)[:, : self.shape[1]]


class Made:
    """A matrix that is put together whenever it is read: what it is made of takes less memory, or is a file.

    Args:
        shape: (outputs, inputs).
        make: puts it together.
    """

    def __init__(self, shape: tuple[int, int], make: Callable[[], Matrix]) -> None:
        self.shape, self.make = shape, make

    def rows(self, index: slice | torch.Tensor) -> torch.Tensor:
        """See ``Matrix``."""
        return self.make().rows(index)


class Learnt:
    """A matrix with what a LoRA adds, W + B A.

    Args:
        a: float32 [r, inputs].
        b: float32 [outputs, r], scaled.
    """

    def __init__(self, whole: Matrix, a: torch.Tensor, b: torch.Tensor) -> None:
        self.whole, self.a, self.b, self.shape = whole, a, b, whole.shape

    def rows(self, index: slice | torch.Tensor) -> torch.Tensor:
        """See ``Matrix``."""
        return torch.addmm(self.whole.rows(index), self.b[index], self.a)


def unpacked(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes of packed bytes [rows, bytes], as float32 [rows, codes]."""
    if bits == 8:
        return codes.float()
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).float()


class Part:
    """Neighbouring rows of a matrix.

    Args:
        whole: the matrix.
        begin: its first row that counts.
        count: of rows.
    """

    def __init__(self, whole: Matrix, begin: int, count: int) -> None:
        self.whole, self.begin, self.shape = whole, begin, (count, whole.shape[1])

    def rows(self, index: slice | torch.Tensor) -> torch.Tensor:
        """See ``Matrix``."""
        if isinstance(index, torch.Tensor):
            return self.whole.rows(index + self.begin)
        start, stop, _ = index.indices(self.shape[0])
        return self.whole.rows(slice(self.begin + start, self.begin + stop))


class Picked:
    """Some rows of matrices that are stacked on each other.

    Args:
        parts: the stack.
        index: places in the stack, one per row.
    """

    def __init__(self, parts: Sequence[Matrix], index: torch.Tensor) -> None:
        self.parts, self.index = parts, index
        self.shape = (len(index), parts[0].shape[1])

    def rows(self, index: slice | torch.Tensor) -> torch.Tensor:
        """See ``Matrix``."""
        wanted = self.index[index]
        found, begin = torch.empty(len(wanted), self.shape[1]), 0
        for part in self.parts:
            here = (wanted >= begin) & (wanted < begin + part.shape[0])
            if here.any():
                found[here] = part.rows(wanted[here] - begin)
            begin += part.shape[0]
        return found


class ExpertMatrices:
    """The matrices of one kind of all experts of a layer, which transformers takes by index.

    Args:
        parts: per expert one matrix, or several that are stacked (gate on up).
    """

    def __init__(self, parts: Sequence[Sequence[Matrix]]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int | torch.Tensor) -> torch.Tensor:
        found = [part.rows(slice(None)) for part in self.parts[int(index)]]
        return found[0] if len(found) == 1 else torch.cat(found)


def linear(x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [.., inputs] times the transposed ``matrix``, plus ``bias``: [.., outputs]; some rows at a time."""
    pieces = list(row_pieces(*matrix.shape))
    if len(pieces) == 1:
        return torch.nn.functional.linear(x, matrix.rows(slice(None)), bias)
    out = x.new_empty(*x.shape[:-1], matrix.shape[0])
    for piece in pieces:
        out[..., piece] = torch.nn.functional.linear(x, matrix.rows(piece), None if bias is None else bias[piece])
    return out


def worst_row(found: Matrix, wanted: Matrix) -> float:
    """Largest ‖found − wanted‖ ÷ ‖wanted‖ of a row; a row shorter than a tenth of the mean counts as that long."""
    off, norms = [], []
    for piece in row_pieces(*wanted.shape):
        rows = wanted.rows(piece)
        off.append((found.rows(piece) - rows).norm(dim=1))
        norms.append(rows.norm(dim=1))
    length = torch.cat(norms)
    return float((torch.cat(off) / length.clamp(min=max(float(length.mean()) / 10, 1e-30))).max())


class StreamedLinear(torch.nn.Module):
    """Stands in a model for a ``torch.nn.Linear`` and holds no weights but those that it is given for a while."""

    def __init__(self, stands_for: torch.nn.Linear) -> None:
        super().__init__()
        self.shape = (stands_for.out_features, stands_for.in_features)
        self.has_bias = stands_for.bias is not None
        self.matrix: Matrix | None = None
        self.bias: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See ``torch.nn.Linear``."""
        assert self.matrix is not None, "a layer is called outside of its turn"
        return linear(x, self.matrix, self.bias)
