"""Matrices of a checkpoint as the HTP takes them: signed codes with one scale per output, or dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_onnx.errors import ExportError
from qwen_onnx.export.weights import CheckpointWeights
from qwen_onnx.sources.checkpoint import read_json

Floats = npt.NDArray[np.float32]


class Linear:
    """One matrix [out, in], read when it is asked for.

    Attributes:
        name: of the module.
        bits: 4, 8, or 32 when it is not quantised.
        factor: everything is multiplied by it.
    """

    def __init__(self, source: Linears, name: str, tensor: str, factor: float) -> None:
        self.name, self.factor = name, factor
        self._source, self._tensor = source, tensor
        self.bits = source.bits(name)

    def dense(self) -> Floats:
        """[out, in] in float32."""
        if self.bits == 32:
            return self._source.array(self._tensor) * np.float32(self.factor)
        codes, scales = self.integers()
        return codes.astype(np.float32) * scales[:, None]

    def integers(self) -> tuple[npt.NDArray[np.int8], Floats]:
        """Signed codes [out, in] and scales [out].

        Raises:
            ExportError: the matrix is not quantised, has zero points, or several scales in a row.
        """
        if self.bits == 32:
            raise self._fault("is not quantised")
        if f"{self.name}.qzeros" in self._source.weights:
            raise self._fault("has zero points")
        codes = self._source.weights.tensor(f"{self.name}.qweight").numpy()
        scales = self._source.array(f"{self.name}.scales")
        if scales.shape[1] != 1:
            raise self._fault(f"has {scales.shape[1]} scales in a row")
        if self.bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
        return (codes.astype(np.int16) - 2 ** (self.bits - 1)).astype(np.int8), scales[:, 0] * np.float32(self.factor)

    def _fault(self, what: str) -> ExportError:
        return ExportError(
            f"{self.name} {what}; the HTP takes symmetric codes with one scale per output",
            where=str(self._source.folder),
            hint="set symmetric: true and group_size: -1 of the quantize step before this one",
        )


class Linears:
    """Matrices, vectors and the embedding of a checkpoint, quantised in Olive's format or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights = CheckpointWeights(folder)
        self.config = read_json(folder / "config.json")
        self._quantized: dict[str, Any] = self.config.get("quantization_config") or {}

    def bits(self, name: str) -> int:
        """Bits of the matrix ``name``; 32 when it is not quantised."""
        if f"{name}.qweight" not in self.weights:
            return 32
        return int(self._quantized["overrides"].get(name, self._quantized)["bits"])

    def linear(self, name: str, factor: float = 1.0) -> Linear:
        """The matrix of the module ``name``; the head is the embedding's where the two are tied."""
        tied = name == "lm_head" and f"{name}.weight" not in self.weights
        tensor = "model.embed_tokens.weight" if tied else f"{name}.weight"
        return Linear(self, name, tensor, factor)

    def array(self, name: str) -> Floats:
        """The tensor ``name`` in float32."""
        array: Floats = self.weights.tensor(name).float().numpy()
        return array

    def __contains__(self, name: str) -> bool:
        return name in self.weights
