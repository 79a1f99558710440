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

from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.errors import VerificationError
from qwen_onnx.processes.memory import free_memory
from qwen_onnx.verify.graph import Graph

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

    from qwen_onnx.artifact.folded import Folded

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
    block = min(BLOCK_BYTES, free_memory() // (4 * threads))
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
    path = folder / GenaiConfig.read(folder, VerificationError).model.decoder.filename
    graph = Graph(path)
    return weights_read(graph.model.graph, graph.folded)


def weights_read(graph: GraphProto, folded: Folded) -> int:
    """Bytes of constants that one token reads; of those that are folded when the model loads, the result's."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    shares: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for node in graph.node:
        if any(name in folded for name in node.output):
            continue
        for place, name in enumerate(node.input):
            if name in stored or name in folded:
                sizes[name] = _bytes(stored[name]) if name in stored else folded.kind(name).bytes
                # a head that shares its weights with the table reads all of them
                shares[name] = max(shares.get(name, 0.0), _share(node, place, folded))
    return round(sum(sizes[name] * share for name, share in shares.items()))


def _share(node: NodeProto, place: int, folded: Folded) -> float:
    if node.op_type in TABLES and place != 1:
        return 0.0
    if node.op_type in EXPERTS:
        chosen = next((item.i for item in node.attribute if item.name == "k"), 1)
        dims = folded.kind(node.input[place]).shape
        return float(min(1.0, chosen / dims[0])) if len(dims) > 1 else 1.0
    return 1.0


def _bytes(tensor: TensorProto) -> int:
    import onnx

    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return len(tensor.raw_data) or prod(tensor.dims) * width
