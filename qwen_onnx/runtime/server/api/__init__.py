"""OpenAI's API: what comes in, what goes out, and the routes between."""

from qwen_onnx.runtime.server.api.routes import make_router

__all__ = ["make_router"]
