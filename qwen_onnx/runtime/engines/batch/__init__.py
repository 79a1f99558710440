"""Continuous batching on the CPU: several answers from one graph, a request joining and leaving between steps."""

from qwen_onnx.runtime.engines.batch.engine import BatchEngine

__all__ = ["BatchEngine"]
