"""A file of weights, written from its beginning to its end, and the tensors whose bytes are in it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from qwen_onnx.artifact.stored import Array

# as genai's builder does it: a multiple of every element's size, and of a cache line
ALIGNMENT = 64


class DataFile:
    """External data of a graph.

    Args:
        path: of the file; it is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def tensor(self, name: str, data_type: int, shape: Iterable[int], pieces: Iterable[Array]) -> Any:
        """Write a tensor (onnx.TensorProto) whose bytes are those of ``pieces``, one after the other."""
        from onnx import TensorProto

        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        for piece in pieces:
            self._file.write(piece.data if piece.flags.c_contiguous else piece.tobytes())
        found = TensorProto(name=name, data_type=data_type, dims=shape, data_location=TensorProto.EXTERNAL)
        told = {"location": self.path.name, "offset": offset, "length": self._file.tell() - offset}
        for key, value in told.items():
            found.external_data.add(key=key, value=str(value))
        return found
