"""The tiny model in fp32: there a batch computes what a row alone does, so that tokens can be compared exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_onnx.runtime import Engine
from qwen_onnx.runtime.engines.batch import BatchEngine


@pytest.fixture(scope="session")
def reference(exact_artifact: Path) -> Engine:
    """onnxruntime-genai on the same graph."""
    return Engine(exact_artifact, threads=1)


@pytest.fixture
def engine(exact_artifact: Path) -> Iterator[BatchEngine]:
    """Three streams, two may wait."""
    running = BatchEngine(exact_artifact, streams=3, queue_size=2, capacity=1024, threads=1)
    yield running
    running.close()
