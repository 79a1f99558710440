"""The memory that an artifact's graph keeps of a conversation: names, sizes and room of its KV cache."""

from __future__ import annotations

import mmap
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qwen_onnx.artifact.genai_config import GENAI_CONFIG, GenaiConfig
from qwen_onnx.errors import ArtifactError, EnvironmentFault
from qwen_onnx.processes.memory import free_memory
from qwen_onnx.runtime.engines.batch.sight import TYPES
from qwen_onnx.runtime.engines.genai import Shape

Floats = np.ndarray[Any, np.dtype[np.float32]]
# of the free memory, for the KV cache; pages are taken only when a conversation reaches them
KV_SHARE = 0.5
LEAST_TOKENS = 256


class UnsupportedGraphError(ArtifactError):
    """The graph cannot be run by rows; the artifact is served one request at a time."""


@dataclass(frozen=True)
class KvLayout:
    """Sizes of the KV cache: each of ``2 * layers`` buffers is [rows, heads, tokens, head_size]."""

    layers: int
    heads: int
    head_size: int
    names: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, folder: Path) -> KvLayout:
        """From ``genai_config.json``.

        Raises:
            ArtifactError: it lacks a name or a size. No other engine is asked then: every graph that we build with a
                KV cache has them, and a file without them is not one that we wrote.
        """
        decoder = GenaiConfig.read(folder).model.decoder
        inputs, outputs = decoder.inputs, decoder.outputs
        kinds = (
            (inputs.past_key_names, outputs.present_key_names),
            (inputs.past_value_names, outputs.present_value_names),
        )
        layers, heads, size = decoder.num_hidden_layers, decoder.num_key_value_heads, decoder.head_size
        if layers is None or heads is None or size is None:
            raise _lacking("a size of the KV cache", folder)
        names = []
        for layer in range(layers):
            for past, present in kinds:
                if past is None or present is None:
                    raise _lacking("a name of the KV cache", folder)
                names.append((past % layer, present % layer))
        return cls(layers, heads, size, tuple(names))

    def within(self, inputs: Collection[str]) -> KvLayout:
        """Of the layers that the graph keeps keys and values of; linear attention keeps others."""
        names = tuple(pair for pair in self.names if pair[0] in inputs)
        return replace(self, layers=len(names) // 2, names=names)

    @property
    def scales(self) -> tuple[int, int, int, int]:
        """Sizes of the scales of an int8 cache, see ``kv_scales``."""
        return self.layers, 2, self.heads, self.head_size

    def bytes_per_token(self, item: int) -> int:
        """Of one row."""
        return len(self.names) * self.heads * self.head_size * item


def logits_of(
    told: Sequence[Any], layout: KvLayout, shape: Shape, folder: Path, cached: dict[str, type[np.generic]]
) -> Any:
    """The graph's logits, once it and the configuration agree on the memory that is handed to it, its type and sizes.

    Args:
        told: its inputs and outputs.

    Raises:
        ArtifactError: they do not; names the first place.
    """
    entries = {entry.name: entry for entry in told}
    wanted = {"logits": (3, 2, shape.vocab_size, TYPES)}
    cache = {name: (4, 1, layout.heads, cached) for pair in layout.names for name in pair}
    for name, (dimensions, place, size, types) in (wanted | cache).items():
        entry = entries.get(name)
        if entry is None or entry.type not in types or len(entry.shape) != dimensions:
            kinds = " or ".join(types)
            raise ArtifactError(f"the graph has no {name}, a {kinds} of {dimensions} dimensions", where=str(folder))
        # a dimension with a name is found when it runs
        if isinstance(entry.shape[place], int) and entry.shape[place] != size:
            raise ArtifactError(
                f"{name} has {entry.shape[place]} where {GENAI_CONFIG} says {size}",
                where=str(folder),
                hint="get the artifact again, or build it",
            )
    return entries["logits"]


def _lacking(what: str, folder: Path) -> ArtifactError:
    return ArtifactError(f"{GENAI_CONFIG} lacks {what}", where=str(folder), hint="get the artifact again, or build it")


def zeros(sizes: tuple[int, ...], kind: type[np.generic], *, sparse: bool = True) -> np.ndarray[Any, Any]:
    """Zeroed memory whose pages are taken when they are first written.

    numpy asks for pages of 2 MB, which a short conversation in each row would take whole: 3 GB instead of 0.2. What is
    always read whole is faster in such pages (``sparse`` false); numpy's own begin 16 bytes behind a cache line.
    """
    memory = mmap.mmap(-1, max(1, int(np.prod(sizes)) * np.dtype(kind).itemsize))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE if sparse else mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, kind).reshape(sizes)


def capacity_of(context: int, asked: int | None, rows: int, layout: KvLayout, item: int, states: int) -> int:
    if asked is not None:
        return min(asked, context)
    free = int((free_memory() - rows * states) * KV_SHARE)
    fitting = free // (rows * layout.bytes_per_token(item)) // LEAST_TOKENS * LEAST_TOKENS
    if fitting < min(LEAST_TOKENS, context):
        raise EnvironmentFault(
            f"{rows} streams of {LEAST_TOKENS} tokens do not fit into the free memory",
            hint="serve with fewer --streams",
        )
    return min(context, fitting)
