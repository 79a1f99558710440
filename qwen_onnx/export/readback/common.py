"""Compare what was built with the plan, in whatever format it is; what the formats' readers share."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.errors import ExportError

if TYPE_CHECKING:
    from qwen_onnx.catalog.schema import Readback

# modules of this folder by the form of the weights; the others are read by ``onnx``
READERS = {"OpenVINO": "openvino", "HTP": "htp"}
SHOWN = 6  # faults in a message


def reader_of(asked: Readback) -> str:
    """The module that reads what the plan asks for."""
    # an IR in floats has no form of its own
    kind = "OpenVINO" if asked.provider == "OpenVINO" else asked.form
    return f"{__package__}.{READERS.get(kind, 'onnx')}"


def read_back(folder: Path, asked: Readback) -> dict[str, Any]:
    """Compare what was built in ``folder`` with the plan.

    Returns:
        A summary for the manifest.

    Raises:
        ExportError: naming the differences.
    """
    summary: dict[str, Any] = import_module(reader_of(asked)).read_back(folder, asked)
    return summary


def provider_of(folder: Path) -> str:
    """genai's name of the execution provider in ``genai_config.json``."""
    return GenaiConfig.read(folder, ExportError, hint=None).provider


def refuse(what: str, faults: Sequence[str]) -> None:
    """ExportError with the first of ``faults``, if there are any."""
    if faults:
        shown = "; ".join(faults[:SHOWN]) + (f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else "")
        raise ExportError(f"{what} is not what the plan asked for: {shown}", hint="qwen-onnx plan shows the request")
