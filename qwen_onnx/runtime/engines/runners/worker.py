"""The child process: ``python -m qwen_onnx.runtime.engines.runners.worker BACKEND FOLDER THREADS``.

Requests are lines of JSON on standard input: ``{"op": "logits" | "start" | "step", "ids": [...]}``. An answer is a line
of JSON, ``{"shape": [...]}`` or ``{"error": "..."}``, and then the float32 numbers in C order.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qwen_onnx.processes.children import Answers

Logits = npt.NDArray[np.float32]


class Backend(Protocol):
    """What runs a model; a module ``<name>`` beside this one has one, called ``Backend``.

    Args of the constructor: folder of the artifact, threads.
    """

    def logits(self, ids: list[int]) -> Logits:
        """Logits [tokens, vocabulary] of a sequence by itself."""

    def start(self, ids: list[int]) -> Logits:
        """Forget everything, read ``ids``; logits [vocabulary] of what follows."""

    def step(self, token: int) -> Logits:
        """Read one more token through the KV cache; logits [vocabulary] of what follows."""


def answer(backend: Backend, request: dict[str, Any]) -> Logits:
    """Logits that a request asks for."""
    ids = [int(token) for token in request["ids"]]
    if request["op"] == "step":
        return backend.step(ids[0])
    return {"logits": backend.logits, "start": backend.start}[request["op"]](ids)


def main(name: str, folder: str, threads: str) -> int:
    """Serve requests until standard input ends."""
    answers = Answers()
    try:
        module = importlib.import_module(f".{name}", __package__)
        backend: Backend = module.Backend(Path(folder), int(threads))
    except Exception as error:  # noqa: BLE001 - engines raise what they like; the parent makes it a typed error
        answers.fail(error)
        return 1
    answers.say({"shape": [0]})
    for question in answers.questions():
        try:
            found = np.ascontiguousarray(answer(backend, question), dtype=np.float32)
        except Exception as error:  # noqa: BLE001 - as above
            answers.fail(error)
            continue
        answers.say({"shape": list(found.shape)}, found.tobytes())
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
