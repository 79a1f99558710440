"""Runtime: serves an exported model with onnxruntime-genai. Imports neither torch nor Olive."""

from qwen_onnx.runtime.engines.genai import Engine, SamplingOptions
from qwen_onnx.runtime.engines.remote import RemoteEngine
from qwen_onnx.runtime.processing import prompts
from qwen_onnx.runtime.processing.template import ChatTemplate
from qwen_onnx.runtime.processing.tokenizer import StreamDecoder, TextTokenizer
from qwen_onnx.runtime.service.generation import ChatPrompt, Completion, Delta, GenerationConfig, TokenLogprob
from qwen_onnx.runtime.service.monitor import Health, QwenMonitor, Thresholds
from qwen_onnx.runtime.service.qwen import QwenService
from qwen_onnx.runtime.service.secure import Policy, SecureQwenService

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
    "SamplingOptions",
    "SecureQwenService",
    "StreamDecoder",
    "TextTokenizer",
    "Thresholds",
    "TokenLogprob",
    "prompts",
]
