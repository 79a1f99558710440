"""One bounded command: ``python -m qwen_onnx.release.guard ORDER``, ORDER being the JSON of ``Order``.

The guard leads a process group of its own, runs the command in it and watches the whole tree of processes. It ends
the tree when that takes too much memory or time, and when its own standard input closes: that is how a release that
was killed leaves no orphans. It is the subreaper of its descendants, so none of them escapes by losing its parent.

Memory is resident memory. An address-space limit (RLIMIT_AS) would not do: mapped weights take address space, not
memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import psutil

from qwen_onnx.processes.children import die_with_parent
from qwen_onnx.records import Record

PR_SET_CHILD_SUBREAPER = 36
EVERY_S = 0.2
LINUX = sys.platform == "linux"


class Order(Record):
    """What to run within which bounds.

    Attributes:
        log: file that what the command says is added to.
        memory: most resident bytes of all its processes together.
        seconds: most time.
    """

    command: tuple[str, ...]
    folder: Path
    log: Path
    memory: int
    seconds: float


class Ended(Record):
    """How it ended.

    Attributes:
        code: exit code; minus the signal that ended it.
        peak: most resident bytes seen, sampled every ``EVERY_S`` seconds.
        broke: the bound that was broken.
    """

    code: int
    peak: int
    seconds: float
    broke: Literal["memory", "time"] | None = None


def resident_bytes(processes: list[psutil.Process]) -> int:
    """Sum over ``processes``; pages that they share count for each, so the sum errs on the side of too much."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def end_descendants() -> None:
    """SIGKILL to every descendant of this process, until none is left."""
    own = psutil.Process()
    while family := own.children(recursive=True):
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        # waits for those that became children of the subreaper, too
        psutil.wait_procs(family, timeout=1)


def _bound_child() -> None:
    """In the child, before the command: it dies with the guard, and a crash writes no core file of gigabytes."""
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _abandoned() -> bool:
    """Wait a little; whether whoever started the guard is gone by then."""
    readable, _, _ = select.select([0], [], [], EVERY_S)
    return bool(readable) and os.read(0, 1) == b""


def watch(order: Order) -> Ended | None:
    """Run the command to its end, or end it; None when nobody waits for it any longer."""
    begin, peak = time.monotonic(), 0
    own = psutil.Process()
    with order.log.open("ab") as log:
        child = subprocess.Popen(
            order.command,
            cwd=order.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=_bound_child,  # noqa: PLW1509  # the guard has one thread
        )
    broke: Literal["memory", "time"] | None = None
    try:
        while child.poll() is None and broke is None:
            if _abandoned():
                return None
            peak = max(peak, resident_bytes(own.children(recursive=True)))
            seconds = time.monotonic() - begin
            broke = "memory" if peak > order.memory else "time" if seconds > order.seconds else None
    finally:
        # first of all the one whose exit code counts
        if child.poll() is None:
            child.kill()
        child.wait()
        end_descendants()
    return Ended(code=child.returncode, peak=peak, seconds=time.monotonic() - begin, broke=broke)


def main() -> int:
    """Print one line of JSON, ``Ended``, when the command has ended."""
    if LINUX:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    ended = watch(Order.model_validate_json(sys.argv[1]))
    if ended is None:
        return 1
    print(ended.model_dump_json(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
