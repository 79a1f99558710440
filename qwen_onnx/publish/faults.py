"""What the shared parts of a transfer raise when they work for publish and pull."""

from __future__ import annotations

from qwen_onnx.errors import PublishError
from qwen_onnx.sources.remote import Faults

FAULTS = Faults(PublishError, PublishError)
