"""A model in another environment, with the methods that verification asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qwen_onnx.errors import ArtifactError, VerificationError
from qwen_onnx.processes.children import LineChild
from qwen_onnx.processes.environments import Interpreter
from qwen_onnx.runtime.engines.genai import Shape

Logits = npt.NDArray[np.float32]


class Runner:
    """A child process that runs ``folder`` by a backend, a module of this package.

    Args:
        folder: artifact with ``genai_config.json``.
        backend: name of the module.
        interpreter: Python of the backend's environment.
        threads: threads of the engine.

    Raises:
        ArtifactError: the backend cannot load the folder.
    """

    def __init__(self, folder: Path, backend: str, interpreter: Interpreter, *, threads: int) -> None:
        self.folder, self.backend = folder, backend
        self.shape = Shape.read(folder)
        self.context_length = self.shape.context_length
        command = [
            str(interpreter.python),
            "-m",
            "qwen_onnx.runtime.engines.runners.worker",
            backend,
            str(folder),
            str(threads),
        ]
        self._child = LineChild(
            command, backend, lambda what: VerificationError(what, where=str(folder)), interpreter.variables
        )
        try:
            self._child.receive()
        except VerificationError as error:
            self.close()
            raise ArtifactError(f"{backend} cannot load the model: {error.what}", where=str(folder)) from error

    def logits(self, ids: Sequence[int]) -> Logits:
        """Logits [tokens, vocabulary] of a sequence by itself."""
        return self._ask("logits", ids)

    def forced_logits(self, prompt_ids: Sequence[int], continuation_ids: Sequence[int]) -> Logits:
        """See ``runtime.engine.Engine.forced_logits``: float32 [len(continuation_ids) + 1, vocabulary]."""
        self.shape.check([*prompt_ids, *continuation_ids], 1)
        rows = [self._ask("start", prompt_ids), *(self._ask("step", [token]) for token in continuation_ids)]
        return np.stack(rows)

    def generate(self, prompt_ids: Sequence[int], *, max_new_tokens: int, stop_on_eos: bool = True) -> Iterator[int]:
        """Greedy continuation; without ``stop_on_eos`` the best other token stands for EOS."""
        self.shape.check(prompt_ids, max_new_tokens)
        row = self._ask("start", prompt_ids)
        for count in range(max_new_tokens):
            if not stop_on_eos:
                row[list(self.shape.eos_token_ids)] = -np.inf
            token = int(row.argmax())
            if token in self.shape.eos_token_ids:
                return
            yield token
            if count + 1 < max_new_tokens:
                row = self._ask("step", [token])

    def close(self) -> None:
        """End the child process."""
        self._child.close()

    def __del__(self) -> None:
        self.close()

    def _ask(self, operation: str, ids: Sequence[int]) -> Logits:
        shape = self._child.ask({"op": operation, "ids": [int(token) for token in ids]})["shape"]
        data = self._child.read(int(np.prod(shape, dtype=np.int64)) * 4)
        return np.frombuffer(data, dtype=np.float32).reshape(shape).copy()
