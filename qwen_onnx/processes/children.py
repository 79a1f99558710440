"""Children that do not outlive their parent, and one protocol with them: a line of JSON each way.

Both sides stand here. The child's side runs in other environments too: it needs the standard library alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from qwen_onnx.errors import QwenOnnxError

PR_SET_PDEATHSIG = 1
# of one line: a prompt of a million tokens as JSON has seven
MOST_LINE = 16 << 20
MOST_WORDS = 500


def die_with_parent() -> None:
    """End this process when the thread that started it ends, however that comes to pass; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_group(child: subprocess.Popen[Any]) -> None:
    """Kill a child that leads a session of its own, with all that it started there, and wait for it. Idempotent."""
    if hasattr(os, "killpg"):
        # gone, or on macOS a zombie
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()
    child.wait()


def last_words(log: IO[bytes]) -> str:
    """``: `` and the last line of what a child wrote to standard error; nothing when it said nothing."""
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - (64 << 10)))
    lines = log.read().decode(errors="replace").strip().splitlines()
    return f": {lines[-1][:MOST_WORDS]}" if lines else ""


class LineChild:
    """The parent's side: a process that answers each line of JSON with one.

    Args:
        command: that calls ``Answers`` first of all.
        name: of what it is, for messages.
        fault: makes the error of a child that failed or died.
        environment: variables; default: those of this process.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        name: str,
        fault: Callable[[str], QwenOnnxError],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._name, self._fault = name, fault
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            # a group to kill; Ctrl-C comes to the parent, which ends it
            start_new_session=True,
        )

    def ask(self, question: Any) -> dict[str, Any]:
        """Send a line and wait for its answer; raises as ``receive``."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(question).encode() + b"\n")
            self._child.stdin.flush()
        except OSError as error:
            raise self._died() from error
        return self.receive()

    def receive(self) -> dict[str, Any]:
        """The next line. Raises what ``fault`` makes: the child said ``error``, or died, or its line has no end."""
        assert self._child.stdout is not None
        line = self._child.stdout.readline(MOST_LINE)
        if not line.endswith(b"\n"):
            raise self._died()
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise self._fault(f"{self._name} failed: {told['error']}")
        return told

    def read(self, size: int) -> bytes:
        """``size`` bytes that follow a line."""
        assert self._child.stdout is not None
        data = self._child.stdout.read(size)
        if len(data) != size:
            raise self._died()
        return data

    def close(self) -> None:
        """End it with all that it started. Idempotent."""
        kill_group(self._child)
        for pipe in (self._child.stdin, self._child.stdout, self._log):
            # what it did not read any more cannot be written
            with contextlib.suppress(BrokenPipeError):
                if pipe:
                    pipe.close()

    def _died(self) -> QwenOnnxError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            # it may be about to say why
            self._child.wait(timeout=5)
        kill_group(self._child)
        said = last_words(self._log)
        return self._fault(f"the process of {self._name} died (exit {self._child.returncode}){said}")


class Answers:
    """The child's side. Whatever a library prints goes to standard error: standard output is for answers.

    Make it first of all: this process ends with its parent from then on.
    """

    def __init__(self) -> None:
        die_with_parent()
        self._out = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)

    def questions(self) -> Iterator[Any]:
        """Until the parent closes its end."""
        for line in sys.stdin.buffer:
            yield json.loads(line)

    def say(self, told: Mapping[str, Any], data: bytes = b"") -> None:
        """A line, and the bytes that it announces."""
        self._out.write(json.dumps(told).encode() + b"\n" + data)
        self._out.flush()

    def fail(self, error: Exception) -> None:
        """Tell the parent, which raises it as a typed error."""
        self.say({"error": f"{type(error).__name__}: {error}"})
