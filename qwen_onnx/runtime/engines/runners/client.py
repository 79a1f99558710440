"""A model in another environment, with the methods that verification asks for."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_onnx.errors import ArtifactError, VerificationError
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
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        command = [
            str(interpreter.python),
            "-m",
            "qwen_onnx.runtime.engines.runners.worker",
            backend,
            str(folder),
            str(threads),
        ]
        self._child = subprocess.Popen(
            command, env=interpreter.variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )
        try:
            self._receive()
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
        self._child.kill()
        self._child.communicate()
        self._log.close()

    def __del__(self) -> None:
        if self._child.poll() is None:
            self.close()

    def _ask(self, operation: str, ids: Sequence[int]) -> Logits:
        request = json.dumps({"op": operation, "ids": [int(token) for token in ids]})
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(request.encode() + b"\n")
            self._child.stdin.flush()
        except OSError as error:
            raise self._died() from error
        return self._receive()

    def _receive(self) -> Logits:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise self._died()
        header: dict[str, Any] = json.loads(line)
        if "error" in header:
            raise VerificationError(f"{self.backend} failed: {header['error']}", where=str(self.folder))
        size = int(np.prod(header["shape"], dtype=np.int64)) * 4
        data = self._child.stdout.read(size)
        if len(data) != size:
            raise self._died()
        return np.frombuffer(data, dtype=np.float32).reshape(header["shape"]).copy()

    def _died(self) -> VerificationError:
        self._child.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        said = f": {lines[-1][:300]}" if lines else ""
        return VerificationError(f"the process of {self.backend} died (exit {self._child.returncode}){said}")
