"""Graphs of an artifact in onnxruntime, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort

from qwen_onnx.errors import ArtifactError, QwenOnnxError


def open_session(
    path: Path,
    threads: int | None,
    rewritten: Callable[[Path], bytes | None] | None = None,
    *,
    called: str = "the model",
) -> ort.InferenceSession:
    """Load a graph.

    Args:
        threads: within an operator; None leaves it to onnxruntime.
        rewritten: the graph without its weights, to load in place of the file's; it returns None where it changes none.
        called: what messages call it.

    Raises:
        ArtifactError: it does not load. Whatever ``rewritten`` raises.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        graph = rewritten(path) if rewritten else None
        if graph is not None:
            # where the graph's weights are
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        return ort.InferenceSession(graph or str(path), options, providers=["CPUExecutionProvider"])
    except QwenOnnxError:
        raise
    # neither onnxruntime's exceptions nor protobuf's have a common class but Exception
    except Exception as error:
        raise ArtifactError(
            f"onnxruntime cannot load {called}: {error}", where=str(path), hint="build it again"
        ) from error
