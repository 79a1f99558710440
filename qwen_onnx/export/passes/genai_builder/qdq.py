"""Weights in QDQ form, as TensorRT reads them: signed INT4 behind DequantizeLinear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

# the names that genai gives to weights of a quantised checkpoint; what it quantises itself is signed already
FROM_CHECKPOINT = ".DequantizeLinear.qweight"
SIGN_BITS = 0x88  # of the two codes in a byte


def write_signed(model: Path) -> int:
    """Turn the unsigned 4-bit codes of a symmetric checkpoint into signed ones, in place.

    genai 0.18 declares them INT4 and leaves the bytes as they are: a code of 8, which stands for zero in the
    checkpoint and for MatMulNBits, would be read as -8.

    Returns:
        The number of matrices.
    """
    import onnx

    graph_file = onnx.load(str(model), load_external_data=False)
    codes = [
        tensor
        for tensor in graph_file.graph.initializer
        if tensor.name.endswith(FROM_CHECKPOINT) and tensor.data_type == onnx.TensorProto.INT4
    ]
    for tensor in codes:
        _flip(tensor, model.parent)
    if any(tensor.raw_data for tensor in codes):
        onnx.save(graph_file, str(model))
    return len(codes)


def _flip(tensor: Any, folder: Path) -> None:
    from onnx.external_data_helper import ExternalDataInfo

    if tensor.raw_data:
        tensor.raw_data = (np.frombuffer(tensor.raw_data, np.uint8) ^ SIGN_BITS).tobytes()
        return
    place = ExternalDataInfo(tensor)
    shape = (int(place.length or 0),)
    stored = np.memmap(folder / place.location, np.uint8, "r+", offset=int(place.offset or 0), shape=shape)
    stored ^= SIGN_BITS
    stored.flush()
