"""The 16-bit grids of an HTP graph's tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TOP = 2**16 - 1
MIDDLE = 2**15
SMALLEST = 1e-9


@dataclass(frozen=True)
class Grid:
    """``(code - zero) * scale`` for codes of 16 bits."""

    scale: float
    zero: int

    @classmethod
    def spanning(cls, low: float, high: float, *, symmetric: bool = False) -> Grid:
        """The finest grid that holds ``low``, ``high`` and zero; symmetric: zero is the middle code."""
        low, high = min(low, 0.0), max(high, 0.0)
        if symmetric:
            scale = np.float32(max(high / (TOP - MIDDLE), -low / MIDDLE, SMALLEST))
            return cls(float(scale), MIDDLE)
        scale = np.float32(max((high - low) / TOP, SMALLEST))
        return cls(float(scale), min(round(-low / float(scale)), TOP))

    def quantize(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
        """The nearest codes; what is outside of the grid saturates."""
        codes: npt.NDArray[np.uint16] = np.clip(np.rint(values / self.scale) + self.zero, 0, TOP).astype(np.uint16)
        return codes

    def dequantize(self, codes: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
        """The numbers that ``codes`` stand for."""
        return (codes.astype(np.float32) - np.float32(self.zero)) * np.float32(self.scale)
