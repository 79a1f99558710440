"""Continuous batching on the CPU: several answers from one graph, a request joining and leaving between steps."""

from qwen_onnx.runtime.batching.engine import BatchEngine

__all__ = ["BatchEngine"]
