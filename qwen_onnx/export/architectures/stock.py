"""genai's own builder classes, which ours extend.

Its package puts its folder on the import path and dispatches to the top-level ``builders``; under the package's name
the same files would be other classes.
"""

from onnxruntime_genai.models import builder  # isort: skip
from builders.base import Model
from builders.mtp import MTPModel
from builders.qwen import (
    Qwen3Model,
    Qwen3VLTextModel,
    Qwen25VLTextModel,
    Qwen35DenseMTPModel,
    Qwen35Model,
    Qwen35MoEModel,
    Qwen35MoETextModel,
    Qwen35MTPModel,
    Qwen35TextModel,
    QwenModel,
)
from onnxruntime_genai.models.loaders.qwen import QwenMTPModel

__all__ = [
    "MTPModel",
    "Model",
    "Qwen3Model",
    "Qwen3VLTextModel",
    "Qwen25VLTextModel",
    "Qwen35DenseMTPModel",
    "Qwen35MTPModel",
    "Qwen35MoEModel",
    "Qwen35MoETextModel",
    "Qwen35Model",
    "Qwen35TextModel",
    "QwenMTPModel",
    "QwenModel",
    "builder",
]
