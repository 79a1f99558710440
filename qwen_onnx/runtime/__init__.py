"""Runtime: serves an exported model with onnxruntime-genai. Imports neither torch nor Olive."""

from qwen_onnx.runtime import prompts
from qwen_onnx.runtime.engine import Engine, RemoteEngine, SamplingOptions
from qwen_onnx.runtime.generation import ChatPrompt, Completion, Delta, GenerationConfig, TokenLogprob
from qwen_onnx.runtime.service import QwenService
from qwen_onnx.runtime.template import ChatTemplate
from qwen_onnx.runtime.tokenizer import StreamDecoder, TextTokenizer

__all__ = [
    "ChatPrompt",
    "ChatTemplate",
    "Completion",
    "Delta",
    "Engine",
    "GenerationConfig",
    "QwenService",
    "RemoteEngine",
    "SamplingOptions",
    "StreamDecoder",
    "TextTokenizer",
    "TokenLogprob",
    "prompts",
]
