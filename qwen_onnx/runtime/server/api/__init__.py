"""OpenAI's API: what comes in, what goes out, and the routes between."""

from qwen_onnx.runtime.server.api.routes import CLAMPED, make_router

__all__ = ["CLAMPED", "make_router"]
