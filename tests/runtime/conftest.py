"""A tiny random model behind the runtime's interfaces; tests of what it says use the starter (slow)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from qwen_onnx.runtime import QwenService
from tests.fixtures.hearing import hearing_artifact
from tests.fixtures.servers import served
from tests.fixtures.speech import speech_artifact
from tests.fixtures.templates import qwen3, qwen3_artifact, qwen3_service
from tests.fixtures.vision import seeing_artifact

# fixtures are found from here
__all__ = [
    "client",
    "hearing_artifact",
    "qwen3",
    "qwen3_artifact",
    "qwen3_service",
    "seeing_artifact",
    "service",
    "speech_artifact",
]


@pytest.fixture(scope="session")
def service(tiny_artifact: Path) -> Iterator[QwenService]:
    """The tiny artifact in this process."""
    running = QwenService(tiny_artifact, threads=1)
    yield running
    running.close()


@pytest.fixture(scope="session")
def client(tiny_artifact: Path) -> Iterator[OpenAI]:
    """The real openai client against a real server with its engine in a child process."""
    with served(tiny_artifact, "tiny") as connected:
        yield connected
