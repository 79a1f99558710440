"""A child process for work on what strangers wrote: JSON lines in and out, under limits that the kernel holds.

It has no network, opens no file, starts no process, and may use so much memory, and so much time for each answer. One
that passes a limit ends, and the next question starts another.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_onnx.errors import EnvironmentFault

if sys.platform != "win32":
    import resource

log = logging.getLogger(__name__)
# imports, on a machine that does other things too
START_SECONDS = 120.0
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
STANDARD_STREAMS = 3
# the parent's own search path: isolated mode ignores PYTHONPATH, and the working directory is nobody's package
BOOT = "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); importlib.import_module(sys.argv[2]).main()"
# nothing else of the environment: it may hold keys
KEPT_VARIABLES = ("PATH", "TZ", "LD_LIBRARY_PATH", "SYSTEMROOT")


@dataclass(frozen=True)
class Limits:
    """Of a child.

    Args:
        memory: bytes beyond what it has when it is ready to work.
        cpu_seconds: processor time of one answer.
        seconds: time of one answer on the clock, waiting included.
        answer_bytes: of one answer, as JSON.
    """

    memory: int = 512 << 20
    cpu_seconds: int = 5
    seconds: float = 20.0
    answer_bytes: int = 64 << 20


class LimitReached(Exception):
    """There is no answer; the words say which limit the child passed, or how else it ended."""


class Limited:
    """A child that starts with the first question and answers one at a time, whichever thread asks.

    Args:
        module: its ``main()`` calls ``serve``.
        arguments: for ``main``, as ``sys.argv[4:]``.
    """

    def __init__(self, module: str, limits: Limits | None = None, arguments: Sequence[str] = ()) -> None:
        self._module, self._arguments, self.limits = module, tuple(arguments), limits or Limits()
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._finalizer: Callable[[], Any] | None = None
        self._closed = False

    def ask(self, question: Any, seconds: float | None = None) -> Any:
        """The child's answer.

        Args:
            question: anything that is JSON.
            seconds: less time than the limits give.

        Raises:
            LimitReached: it passed a limit, or ended.
            EnvironmentFault: it does not start.
            TypeError, ValueError, RecursionError: the question is not JSON.
        """
        line = json.dumps(question).encode() + b"\n"
        most = min(self.limits.seconds, self.limits.seconds if seconds is None else seconds)
        deadline = time.monotonic() + most
        if not self._lock.acquire(timeout=max(most, 0)):
            raise LimitReached(f"it had no turn within {most:g} s")
        try:
            if self._child is None or self._child.poll() is not None:
                self._start()
                # a start is the machine's doing
                deadline = time.monotonic() + most
            return self._exchange(line, deadline - time.monotonic(), most)["answer"]
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the child, also in the middle of an answer."""
        self._closed = True
        if self._finalizer:
            self._finalizer()

    def _start(self) -> None:
        if self._closed:
            raise LimitReached("it is closed")
        paths = json.dumps([str(Path(path).resolve()) for path in sys.path if path])
        command = [sys.executable, "-I", "-c", BOOT, paths, self._module, json.dumps(asdict(self.limits))]
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        if self._finalizer:
            self._finalizer()
        self._child = subprocess.Popen(
            [*command, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment | {"HF_HUB_OFFLINE": "1"},
            # Ctrl-C in a terminal is for the parent; until the child runs its own code, it would end it
            start_new_session=True,
        )
        self._finalizer = weakref.finalize(self, _end, self._child)
        try:
            missing = self._exchange(b"", START_SECONDS, START_SECONDS)["missing"]
        except LimitReached as error:
            raise EnvironmentFault(
                f"the process for untrusted work does not start: {error}",
                hint=f"{sys.executable} -c 'import {self._module}'",
            ) from error
        if missing:
            log.warning("this system sets a process no limit of: %s", ", ".join(missing))

    def _exchange(self, line: bytes, seconds: float, most: float) -> dict[str, Any]:
        """Write a line and read one; LimitReached when none comes in time, after which the child is gone."""
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(max(seconds, 0), kill)
        timer.daemon = True
        timer.start()
        try:
            child.stdin.write(line)
            child.stdin.flush()
            told = child.stdout.readline(self.limits.answer_bytes)
        # it ended, or ``close`` ended it and closed its files
        except (OSError, ValueError):
            told = b""
        finally:
            timer.cancel()
            timer.join()
        answer = json.loads(told) if told.endswith(b"\n") else {}
        if not answer or "fault" in answer:
            child.kill()
            code = child.wait()
            raise LimitReached(answer.get("fault") or self._ending(code, len(told), most if late.is_set() else None))
        return answer

    def _ending(self, code: int, told: int, late: float | None) -> str:
        if late is not None:
            return f"it took more than {late:g} s"
        if told >= self.limits.answer_bytes:
            return f"its answer has more than {self.limits.answer_bytes} bytes"
        if sys.platform != "win32" and code == -signal.SIGXCPU:
            return f"it took more than {self.limits.cpu_seconds} s of processor time"
        return "its process was ended" if code < 0 else f"its process ended with exit code {code}"


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    # whoever writes to it or reads from it is told of its end
    child.wait()
    for pipe in (child.stdin, child.stdout):
        # what it did not read any more cannot be written
        with contextlib.suppress(OSError):
            if pipe:
                pipe.close()


def serve(answer: Callable[[Any], Any]) -> None:
    """The child's side: confine this process, then answer until the parent goes.

    Whatever it needs is imported and opened before. An exception of ``answer`` ends the process.
    """
    limits = Limits(**json.loads(sys.argv[3]))
    _say({"missing": confine(limits.memory)})
    for line in sys.stdin.buffer:
        _allow(limits.cpu_seconds)
        try:
            told = {"answer": answer(json.loads(line))}
            _say(told)
        except MemoryError:
            _say({"fault": f"it needs more than {limits.memory >> 20} MiB of memory"})
            return


def _say(value: Any) -> None:
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()


def confine(memory: int) -> list[str]:
    """Give up network, files, children and memory beyond ``memory`` more bytes; what this system cannot limit."""
    # Ctrl-C goes to the whole group; the parent decides when to end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "win32":
        return ["memory", "processor time", "files", "network"]
    if sys.platform == "linux":
        # beside the ban on descriptors, without which no socket is made; not every container permits it
        ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET)
    status = Path("/proc/self/statm")
    pages = int(status.read_text().split()[0]) if status.exists() else None
    wanted = {
        "core dumps": (resource.RLIMIT_CORE, 0),
        "file sizes": (resource.RLIMIT_FSIZE, 0),
        "processes": (resource.RLIMIT_NPROC, 0),
        "files and network": (resource.RLIMIT_NOFILE, STANDARD_STREAMS),
    }
    missing = []
    if pages is None:
        missing.append("memory")
    else:
        wanted["memory"] = (resource.RLIMIT_AS, pages * resource.getpagesize() + memory)
    for name, (limit, most) in wanted.items():
        try:
            resource.setrlimit(limit, (most, most))
        except (ValueError, OSError):
            missing.append(name)
    return missing


def _allow(seconds: int) -> None:
    """Processor time from now on; beyond it the kernel ends this process."""
    if sys.platform != "win32":
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + seconds + 1, most))
