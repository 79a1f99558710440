"""How fast an artifact could be at most: a token reads every weight once, and memory gives so many bytes a second.

``bytes_per_token`` comes from the graph, ``bandwidth`` from reading memory with as many threads as the model has. The
KV cache and the activations are not counted, so that the limit is a little too high and the share a little too low.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.errors import VerificationError

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

# looked up by rows: a token reads one of them
TABLES = {"Gather", "GatherBlockQuantized"}
EXPERTS = {"QMoE", "MoE"}
# larger than the caches of server processors
BLOCK_BYTES = 256 << 20
ROUNDS = 5


def bandwidth(threads: int, rounds: int = ROUNDS) -> float:
    """Bytes per second that ``threads`` threads read from memory together: the best of several rounds.

    Each thread looks for the largest number of an array of its own: one stream of reads, and numpy lets go of the lock.
    """
    block = min(BLOCK_BYTES, psutil.virtual_memory().available // (4 * threads))
    arrays = [np.ones(block // 4, np.float32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            begin = time.perf_counter()
            list(pool.map(_read, arrays))
            best = max(best, threads * arrays[0].nbytes / (time.perf_counter() - begin))
    return best


def _read(array: np.ndarray[tuple[int], np.dtype[np.float32]]) -> float:
    return float(np.maximum.reduce(array))


def bytes_per_token(folder: Path) -> int:
    """Bytes of weights that one decoded token reads: all but tables, and of the experts those that are chosen.

    Raises:
        VerificationError: the folder's graph cannot be read.
    """
    import onnx
    from google.protobuf.message import DecodeError

    path = folder / GenaiConfig.read(folder, VerificationError).model.decoder.filename
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise VerificationError(f"the graph cannot be read: {error}", where=str(path)) from error
    return weights_read(graph)


def weights_read(graph: GraphProto) -> int:
    """Bytes of initialisers that one token reads."""
    sizes = {tensor.name: _bytes(tensor) for tensor in graph.initializer}
    shares: dict[str, float] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in sizes:
                # a head that shares its weights with the table reads all of them
                shares[name] = max(shares.get(name, 0.0), _share(node, place, graph))
    return round(sum(sizes[name] * share for name, share in shares.items()))


def _share(node: NodeProto, place: int, graph: GraphProto) -> float:
    if node.op_type in TABLES and place != 1:
        return 0.0
    if node.op_type in EXPERTS:
        chosen = next((item.i for item in node.attribute if item.name == "k"), 1)
        name = node.input[place]
        dims = next(tensor.dims for tensor in graph.initializer if tensor.name == name)
        return float(min(1.0, chosen / dims[0])) if len(dims) > 1 else 1.0
    return 1.0


def _bytes(tensor: TensorProto) -> int:
    import onnx

    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return len(tensor.raw_data) or prod(tensor.dims) * width
