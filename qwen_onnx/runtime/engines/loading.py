"""Which engine suits an artifact, and how it is asked to load it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from qwen_onnx.artifact.seal import Seal, verify_runnable
from qwen_onnx.errors import ArtifactError
from qwen_onnx.runtime.engines import QUEUE_SIZE, STREAMS, KvCache, Speculate
from qwen_onnx.runtime.engines.adapters import AdapterSource, Swapping
from qwen_onnx.runtime.engines.batch.engine import BatchEngine
from qwen_onnx.runtime.engines.batch.layout import UnsupportedGraphError
from qwen_onnx.runtime.engines.serial import SerialEngine

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    """How to load an artifact; the first fields are those of ``BatchEngine``.

    Args:
        speculate: see ``BatchEngine``; genai's engine has none.
        kv_cache: see ``BatchEngine``; genai's engine has the graph's own alone.
        verify: check every byte before it is loaded, each time that it is; expect: its digest, see ``verify_runnable``.
    """

    streams: int = STREAMS
    queue_size: int = QUEUE_SIZE
    capacity: int | None = None
    threads: int | None = None
    verify: bool = False
    expect: str | None = None
    speculate: Speculate = "auto"
    adapters: tuple[AdapterSource, ...] = ()
    swapping: Swapping | None = None
    kv_cache: KvCache = "float"


def load_engine(folder: Path, options: EngineOptions) -> BatchEngine | SerialEngine:
    """The engine that suits the artifact: continuous batching where the graph allows it, else genai.

    Raises:
        ArtifactError: neither loads it; an adapter does not fit; or there is no int8 KV cache for it.
    """
    try:
        return BatchEngine(
            folder,
            streams=options.streams,
            queue_size=options.queue_size,
            capacity=options.capacity,
            threads=options.threads,
            speculate=options.speculate,
            adapters=options.adapters,
            swapping=options.swapping,
            kv_cache=options.kv_cache,
        )
    except UnsupportedGraphError as error:
        if options.adapters or options.swapping:
            hint = "leave --adapter and --adapter-folder out, or merge it: qwen-onnx optimize MODEL --adapter FOLDER"
            what = f"adapters are served in batches alone, and this graph allows none: {error.what}"
            raise ArtifactError(what, where=str(folder), hint=hint) from error
        if options.kv_cache != "float":
            what = f"an int8 KV cache is served in batches alone, and this graph allows none: {error.what}"
            raise ArtifactError(what, where=str(folder), hint="leave --kv-cache out") from error
        log.warning("one request at a time: %s", error.what)
        return SerialEngine(folder, queue_size=options.queue_size, threads=options.threads)


def load_verified(folder: Path, options: EngineOptions) -> tuple[BatchEngine | SerialEngine, Seal | None]:
    """The engine, and the seal of what it has loaded if ``options`` ask for one.

    Raises:
        ArtifactError: nothing loads it; it is not whole, not the expected one, or was changed meanwhile.
    """
    seal = verify_runnable(folder, options.expect) if options.verify else None
    engine = load_engine(folder, options)
    try:
        if seal:
            seal.require_untouched()
    except ArtifactError:
        engine.close()
        raise
    return engine, seal
