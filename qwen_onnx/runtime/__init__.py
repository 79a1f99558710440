"""Runtime: serves an exported model with onnxruntime-genai. Imports neither torch nor Olive.

The public names are loaded when they are first used: what runs in the environment of another engine imports modules
below this one without their packages.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_onnx.runtime.engines.genai import Engine
    from qwen_onnx.runtime.engines.interface import cache_scoped
    from qwen_onnx.runtime.engines.remote import RemoteEngine
    from qwen_onnx.runtime.engines.sampling import Sampling
    from qwen_onnx.runtime.processing import prompts
    from qwen_onnx.runtime.processing.template import ChatTemplate
    from qwen_onnx.runtime.processing.tokenizer import StreamDecoder, TextTokenizer
    from qwen_onnx.runtime.service.generation import ChatPrompt, Completion, Delta, GenerationConfig, TokenLogprob
    from qwen_onnx.runtime.service.monitor import Health, QwenMonitor, Thresholds
    from qwen_onnx.runtime.service.policy import Policy
    from qwen_onnx.runtime.service.qwen import QwenService
    from qwen_onnx.runtime.service.secure import SecureQwenService

_PLACES = {
    "ChatPrompt": "service.generation",
    "ChatTemplate": "processing.template",
    "Completion": "service.generation",
    "Delta": "service.generation",
    "Engine": "engines.genai",
    "GenerationConfig": "service.generation",
    "Health": "service.monitor",
    "Policy": "service.policy",
    "QwenMonitor": "service.monitor",
    "QwenService": "service.qwen",
    "RemoteEngine": "engines.remote",
    "Sampling": "engines.sampling",
    "SecureQwenService": "service.secure",
    "StreamDecoder": "processing.tokenizer",
    "TextTokenizer": "processing.tokenizer",
    "Thresholds": "service.monitor",
    "TokenLogprob": "service.generation",
    "cache_scoped": "engines.interface",
    "prompts": "processing.prompts",
}
__all__ = [
    "ChatPrompt",
    "ChatTemplate",
    "Completion",
    "Delta",
    "Engine",
    "GenerationConfig",
    "Health",
    "Policy",
    "QwenMonitor",
    "QwenService",
    "RemoteEngine",
    "Sampling",
    "SecureQwenService",
    "StreamDecoder",
    "TextTokenizer",
    "Thresholds",
    "TokenLogprob",
    "cache_scoped",
    "prompts",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_PLACES[name]}")
    return module if _PLACES[name].endswith(f".{name}") else getattr(module, name)
