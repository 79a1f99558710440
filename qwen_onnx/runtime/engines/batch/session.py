"""Graphs of an artifact in onnxruntime, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from qwen_onnx.errors import ArtifactError, QwenOnnxError
from qwen_onnx.runtime.engines.batch.rewritten import rewritten, without_slots

# bytes of a graph up to which it is loaded twice; of a larger one empty slots are by count less than 3 % of a step
MOST_TWICE = 256 << 20


def open_session(
    path: Path,
    threads: int | None,
    rewritten: Callable[[Path], bytes | None] | None = None,
    *,
    called: str = "the model",
    taking_turns: bool = False,
) -> ort.InferenceSession:
    """Load a graph.

    Args:
        threads: within an operator; None leaves it to onnxruntime.
        rewritten: the graph without its weights, to load in place of the file's; it returns None where it changes none.
        called: what messages call it.
        taking_turns: another graph runs between its steps, whose threads would meet those of this one waiting busily.

    Raises:
        ArtifactError: it does not load. Whatever ``rewritten`` raises.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if taking_turns:
        options.add_session_config_entry("session.force_spinning_stop", "1")
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


def open_with_slots(
    path: Path,
    threads: int | None,
    changes: Sequence[Callable[[Any], bool]],
    filled: Collection[str] | None,
    *,
    taking_turns: bool = False,
) -> tuple[ort.InferenceSession, ort.InferenceSession]:
    """Load a graph that may have slots for adapters.

    Args:
        changes: of the graph, see ``rewritten``.
        filled: inputs whose slots are needed; None: any may be.
        taking_turns: see ``open_session``; two graphs do anyway.

    Returns:
        The graph with these slots, and one for those whom no adapter answers: a small one has none, and its weights
        are in memory a second time; else it is the same.

    Raises:
        ArtifactError: as ``open_session``.
    """

    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    twice = size <= MOST_TWICE and (filled is None or bool(filled))
    turns = twice or taking_turns

    def opened(kept: Collection[str] | None) -> ort.InferenceSession:
        taken = [] if kept is None else [lambda graph: without_slots(graph, kept)]
        return open_session(path, threads, lambda file: rewritten(file, [*changes, *taken]), taking_turns=turns)

    session = opened(filled)
    return session, opened(()) if twice else session
