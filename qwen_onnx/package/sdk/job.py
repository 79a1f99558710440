"""The child process of ``package.foundry_check``: ``python -m qwen_onnx.package.sdk.job``.

It reads a ``Job`` as one line of JSON from standard input, cuts itself off from the network, and runs the job's phases
one after another, each in a process of its own: ``python -m qwen_onnx.package.sdk.job PHASE``. Every step is a line of
JSON on standard output, after a first one with the folder for all that Foundry writes. All of them end when their
standard input does, and the first takes that folder with it, so that nothing outlives who asked.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1
FAILED = 3
STATE_PREFIX = "qwen-onnx-foundry-"
# a proxy that nobody is: for systems where the network cannot be cut off
NOWHERE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
LOCAL = {"no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost"}


class StepError(Exception):
    """A step gave something else than it must."""


class Limit(Exception):
    """Foundry Local stops here by itself, whatever the package is."""


@dataclass(frozen=True)
class Job:
    """What is checked.

    Attributes:
        backend: module of this package with ``PHASES``.
        folder: the package; ``model_id`` its id.
        strings, ints: properties to register.
        prompts: each a name, messages of role and content, and the tokens that they must count.
        seeing: what a model that sees is asked about pictures, as ``package.pictures`` makes it; else empty.
        state: the folder for all that Foundry writes; the child that gets the job makes it.
    """

    backend: str
    folder: str
    model_id: str
    strings: dict[str, str]
    ints: dict[str, int]
    prompts: list[dict[str, Any]]
    seeing: dict[str, Any] = field(default_factory=dict)
    state: str = ""


def compared(job: Job, counts: list[int]) -> str:
    """What to say when every prompt has as many tokens as expected; StepError names those that have not."""
    wrong = [
        f"{prompt['name']}: {count}, expected {prompt['tokens']}"
        for prompt, count in zip(job.prompts, counts, strict=True)
        if count != prompt["tokens"]
    ]
    if wrong:
        raise StepError(f"prompts have other numbers of tokens: {'; '.join(wrong)}")
    return f"{len(counts)} prompts equal: {', '.join(map(str, counts))}"


class Phase(Protocol):
    """What one process does: ``step(name)`` is a context in which that step is done and said to have been."""

    def __call__(self, job: Job, step: Callable[[str], Any]) -> None: ...


def cut_off_network() -> bool:
    """Leave this process and its children a loopback device and nothing else; false where the kernel refuses."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare"):
        return False
    if libc.unshare(CLONE_NEWNET) != 0:
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
            return False
        for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(line)
    _loopback_up()
    return True


def _loopback_up() -> None:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        asked = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(handle, SIOCGIFFLAGS, asked), 16)
        fcntl.ioctl(handle, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def end_with_input(clean: Callable[[], None]) -> None:
    """End this process, after ``clean``, when its standard input does."""

    def watch() -> None:
        # not sys.stdin: its lock would be held at exit
        while os.read(0, 1024):
            pass
        clean()
        os._exit(FAILED)

    threading.Thread(target=watch, daemon=True).start()


def read_job() -> Job:
    """The job: a line of JSON on standard input, which stays open."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 1)
        if not piece:
            sys.exit("no job")
        line += piece
    return Job(**json.loads(line))


def run_phase(name: str, say: Callable[[dict[str, Any]], None]) -> int:
    """Do one phase; the first step that fails is the last."""
    job = read_job()
    end_with_input(lambda: None)
    current = ["import"]

    @contextmanager
    def step(title: str) -> Iterator[list[str]]:
        current[0], begin = title, time.perf_counter()
        notes: list[str] = []
        told: dict[str, Any] = {"step": title, "ok": True}
        try:
            yield notes
        except Limit as limit:
            notes.append(str(limit))
            told["limit"] = True
        say({**told, "found": "; ".join(notes), "seconds": round(time.perf_counter() - begin, 3)})

    try:
        phases: dict[str, Phase] = importlib.import_module(f".{job.backend}", __package__).PHASES
        phases[name](job, step)
    except Exception as error:  # noqa: BLE001 - libraries raise what they like; the parent makes it a typed error
        kind = "" if isinstance(error, StepError) else f"{type(error).__name__}: "
        say({"step": current[0], "ok": False, "found": f"{kind}{error}"[:2000]})
        return FAILED
    return 0


def supervise(say: Callable[[dict[str, Any]], None], out: int) -> int:
    """Run every phase of the job; stops at the first that fails."""
    # before there are threads, which the kernel does not allow here
    alone = cut_off_network()
    job = replace(read_job(), state=tempfile.mkdtemp(prefix=STATE_PREFIX))
    running: list[subprocess.Popen[bytes]] = []
    ending = threading.Event()

    def clean() -> None:
        ending.set()
        for child in running:
            child.kill()
            child.wait()
        shutil.rmtree(job.state, ignore_errors=True)

    end_with_input(clean)
    network = "no network but loopback" if alone else "by a proxy that is nobody"
    try:
        # whoever asked may be gone by now, and nobody reads
        say({"state": job.state})
        say({"step": "offline", "ok": True, "found": network})
        return _run_phases(job, say, out, running, ending)
    finally:
        shutil.rmtree(job.state, ignore_errors=True)


def _run_phases(
    job: Job,
    say: Callable[[dict[str, Any]], None],
    out: int,
    running: list[subprocess.Popen[bytes]],
    ending: threading.Event,
) -> int:
    for name in importlib.import_module(f".{job.backend}", __package__).PHASE_NAMES:
        child = subprocess.Popen(
            [sys.executable, "-m", "qwen_onnx.package.sdk.job", name],
            env={**os.environ, **NOWHERE, **LOCAL, "HOME": job.state, "TMPDIR": job.state},
            cwd=job.state,
            stdin=subprocess.PIPE,
            stdout=out,
        )
        running[:] = [child]
        assert child.stdin is not None
        child.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        child.stdin.flush()
        code = child.wait()
        if ending.is_set():
            # the watcher killed it, and ends this process when it has tidied up
            threading.Event().wait()
        if code != 0:
            if code != FAILED:
                say({"step": f"process of {name}", "ok": False, "found": f"died (exit {code})"})
            return FAILED
    return 0


def main(arguments: list[str]) -> int:
    """Without arguments the whole job, else the phase that is named."""
    # whatever a library prints goes to standard error: standard output is for steps
    out = os.dup(1)
    os.dup2(2, 1)
    os.set_inheritable(out, True)

    def say(step: dict[str, Any]) -> None:
        os.write(out, json.dumps(step).encode() + b"\n")

    return run_phase(arguments[0], say) if arguments else supervise(say, out)


if __name__ == "__main__":
    # as the module that the backends import: an exception of __main__ is another class than theirs
    code = importlib.import_module("qwen_onnx.package.sdk.job").main(sys.argv[1:])
    sys.stdout.flush()
    # native threads of Foundry may still run; there is nothing left to wait for
    os._exit(code)
