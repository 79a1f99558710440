"""The tiny model in fp32: there a batch computes what a row alone does, so that tokens can be compared exactly."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_onnx.runtime import Engine
from qwen_onnx.runtime.batching import BatchEngine


@pytest.fixture(scope="session")
def exact_artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, exported without quantisation."""
    folder = tmp_path_factory.mktemp("exact") / "fp32"
    code = (
        "import sys; from pathlib import Path; from qwen_onnx.export.builder import build\n"
        "from qwen_onnx.passes import GenAIModelBuilderConfig as Config\n"
        "build(Path(sys.argv[1]), Path(sys.argv[2]), Config(precision='fp32'))"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_checkpoint), str(folder)], check=True, capture_output=True)
    return folder


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
