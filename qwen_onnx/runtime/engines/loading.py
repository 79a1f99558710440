"""Which engine suits an artifact, and how it is asked to load it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from qwen_onnx.runtime.engines import QUEUE_SIZE, STREAMS
from qwen_onnx.runtime.engines.batch.engine import BatchEngine
from qwen_onnx.runtime.engines.batch.model import UnsupportedGraphError
from qwen_onnx.runtime.engines.serial import SerialEngine

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    """How to load an artifact; the fields are those of ``BatchEngine``."""

    streams: int = STREAMS
    queue_size: int = QUEUE_SIZE
    capacity: int | None = None
    threads: int | None = None


def load_engine(folder: Path, options: EngineOptions) -> BatchEngine | SerialEngine:
    """The engine that suits the artifact: continuous batching where the graph allows it, else genai.

    Raises:
        ArtifactError: neither loads it.
    """
    try:
        return BatchEngine(
            folder,
            streams=options.streams,
            queue_size=options.queue_size,
            capacity=options.capacity,
            threads=options.threads,
        )
    except UnsupportedGraphError as error:
        log.warning("one request at a time: %s", error.what)
        return SerialEngine(folder, queue_size=options.queue_size, threads=options.threads)
