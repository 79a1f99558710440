"""Constants of an ONNX file as they are stored: inside the file, or mapped from the file of weights beside it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_onnx.errors import QwenOnnxError

FLOAT, UINT8, INT64, FLOAT16, INT4 = 1, 2, 7, 10, 22  # onnx.TensorProto.DataType
# of INT4 the bytes, two codes in each
TYPES: dict[int, Any] = {FLOAT: np.float32, UINT8: np.uint8, FLOAT16: np.float16, INT4: np.uint8}

Array = npt.NDArray[Any]


def is_external(tensor: Any) -> bool:
    """Whether the bytes of a tensor are in a file beside the graph's."""
    return bool(tensor.data_location == tensor.EXTERNAL)


def mapped_bytes(tensor: Any, file: Path, length: int, error: type[QwenOnnxError]) -> Array:
    """``length`` bytes of an external tensor of the graph in ``file``, as uint8; a copy of the page that is written.

    Raises:
        error: they are not in a file of that folder.
    """
    told = {item.key: item.value for item in tensor.external_data}
    location, begin = told.get("location", ""), told.get("offset", "0")
    path = file.parent / Path(location).name
    offset = int(begin) if begin.isascii() and begin.isdigit() else -1
    inside = path.name == location and path.is_file() and min(offset, length) >= 0
    if not inside or path.stat().st_size < offset + length:
        raise error(f"{tensor.name} is not in {location}", where=str(file))
    # torch wants memory that it may write to
    return np.memmap(path, np.uint8, mode="c", offset=offset, shape=(length,)) if length else np.empty(0, np.uint8)


def stored_array(tensor: Any, file: Path, error: type[QwenOnnxError]) -> Array:
    """A tensor of one of ``TYPES`` in the graph of ``file``.

    Raises:
        error: it is of another type, or its data are not where the graph says.
    """
    from onnx import numpy_helper

    if tensor.data_type not in TYPES:
        raise error(f"{tensor.name} is not a constant that can be read", where=str(file))
    dtype, shape = np.dtype(TYPES[tensor.data_type]), tuple(tensor.dims)
    if tensor.data_type == INT4:
        shape = (*shape[:-1], shape[-1] // 2)
    if is_external(tensor):
        mapped: Array = mapped_bytes(tensor, file, math.prod(shape) * dtype.itemsize, error).view(dtype)
        return mapped.reshape(shape)
    plain = np.frombuffer(tensor.raw_data, dtype) if tensor.raw_data else numpy_helper.to_array(tensor)
    found: Array = plain.reshape(shape).copy()
    return found
