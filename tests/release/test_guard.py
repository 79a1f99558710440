"""Bounds of a job's processes: memory, time, and the life of whoever started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from qwen_onnx.errors import ReleaseError
from qwen_onnx.release.guard import Ended, Order
from qwen_onnx.release.process import run_guarded

MB = 10**6
# in a session of its own, deaf to SIGTERM: nothing but the guard finds it
ESCAPED = (
    "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'], start_new_session=True)\n"
    "print(child.pid, flush=True); {then}"
)


def order(tmp_path: Path, code: str, *, memory: int = 1000 * MB, seconds: float = 60.0) -> Order:
    command = (sys.executable, "-c", code)
    return Order(command=command, folder=tmp_path, log=tmp_path / "log", memory=memory, seconds=seconds)


def run(tmp_path: Path, code: str, **bounds: float) -> Ended:
    return run_guarded(order(tmp_path, code, **bounds))  # type: ignore[arg-type]


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether the process ends within that time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def first_line(log: Path) -> str:
    """The first whole line of a log, once it is there."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if log.exists() and "\n" in (text := log.read_text()):
            return text.splitlines()[0]
        time.sleep(0.05)
    raise AssertionError("nothing was said")


def test_exit_codes_and_words_come_back(tmp_path: Path) -> None:
    ended = run(tmp_path, "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)")
    assert (ended.code, ended.broke) == (7, None)
    assert sorted((tmp_path / "log").read_text().split()) == ["err", "out"]
    assert run(tmp_path, "import os; os.kill(os.getpid(), 11)").code == -signal.SIGSEGV


def test_a_process_that_takes_too_much_memory_is_ended(tmp_path: Path) -> None:
    begin = time.monotonic()
    ended = run(tmp_path, "x = bytearray(400_000_000)\nimport time; time.sleep(60)", memory=200 * MB)
    assert ended.broke == "memory"
    assert ended.peak > 200 * MB
    assert time.monotonic() - begin < 30


def test_memory_counts_over_the_whole_tree(tmp_path: Path) -> None:
    half = "x = bytearray(150_000_000); import time; time.sleep(60)"
    tree = f"import subprocess, sys; [subprocess.Popen([sys.executable, '-c', {half!r}]) for _ in range(2)][0].wait()"
    assert run(tmp_path, tree, memory=250 * MB).broke == "memory"


@pytest.mark.slow
def test_a_process_that_takes_too_long_is_ended_with_all_it_started(tmp_path: Path) -> None:
    ended = run(tmp_path, ESCAPED.format(then="time.sleep(300)"), seconds=1.5)
    assert ended.broke == "time"
    assert gone(int(first_line(tmp_path / "log")), seconds=1)


def test_nothing_outlives_a_command_that_ended_well(tmp_path: Path) -> None:
    ended = run(tmp_path, ESCAPED.format(then="pass"))
    assert (ended.code, ended.broke) == (0, None)
    assert gone(int(first_line(tmp_path / "log")), seconds=1)


def test_kill_9_of_whoever_started_it_leaves_no_orphan(tmp_path: Path) -> None:
    wanted = order(tmp_path, ESCAPED.format(then="time.sleep(300)")).model_dump_json()
    starter = (
        "import sys; from qwen_onnx.release.guard import Order; from qwen_onnx.release.process import run_guarded\n"
        "run_guarded(Order.model_validate_json(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", starter, wanted])
    escaped = int(first_line(tmp_path / "log"))
    family = psutil.Process(process.pid).children(recursive=True)
    assert escaped in {child.pid for child in family}
    process.kill()
    process.wait()
    assert all(gone(child.pid) for child in family)


def test_a_guard_that_is_killed_is_told_and_takes_its_command_along(tmp_path: Path) -> None:
    suicide = "os.kill(os.getppid(), signal.SIGKILL); time.sleep(300)"
    code = f"import os, signal, time; print(os.getpid(), flush=True); {suicide}"
    with pytest.raises(ReleaseError, match="the guard of a job died"):
        run(tmp_path, code)
    assert gone(int(first_line(tmp_path / "log")))


def test_the_guard_says_what_it_saw_as_json(tmp_path: Path) -> None:
    wanted = order(tmp_path, "pass").model_dump_json()
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "qwen_onnx.release.guard", wanted]
    done = subprocess.run(command, stdin=reader, capture_output=True, text=True, check=False)
    os.close(writer)
    os.close(reader)
    assert json.loads(done.stdout)["code"] == 0
