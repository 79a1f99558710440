"""qwen-onnx: any Qwen model, any target, a proven ONNX artifact."""

__version__ = "0.1.0"
