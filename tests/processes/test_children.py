"""A child answers line by line, is told apart when it fails or dies, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from qwen_onnx.errors import VerificationError
from qwen_onnx.processes.children import MOST_LINE, LineChild

CHILD = """
import os, subprocess, sys, time
from qwen_onnx.processes.children import Answers

answers = Answers()
print("a library prints")
for question in answers.questions():
    if question == "fail":
        answers.fail(ValueError("no"))
    elif question == "bytes":
        answers.say({"size": 3}, b"a\\nb")
    elif question == "long":
        answers.say({"text": "x" * (MOST + 1)})
    elif question == "die":
        print("the last words", file=sys.stderr)
        os._exit(4)
    elif question == "start":
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        answers.say({"pids": [os.getpid(), grandchild.pid]})
    elif question == "where":
        answers.say({"pids": [os.getpid()]})
        time.sleep(600)
    else:
        answers.say({"asked": question})
""".replace("MOST", str(MOST_LINE))
PARENT = f"""
import sys, time
from qwen_onnx.errors import VerificationError
from qwen_onnx.processes.children import LineChild

child = LineChild([sys.executable, "-c", {CHILD!r}], "it", VerificationError)
print(*child.ask("where")["pids"], flush=True)
time.sleep(600)
"""
WITHIN = 60


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < WITHIN, "it did not come to pass"
        time.sleep(0.05)


@pytest.fixture
def child() -> Iterator[LineChild]:
    made = LineChild([sys.executable, "-c", CHILD], "it", VerificationError)
    yield made
    made.close()


def test_it_answers_in_turn_and_goes_on_after_a_failure(child: LineChild) -> None:
    assert child.ask({"a": 1}) == {"asked": {"a": 1}}
    with pytest.raises(VerificationError, match="it failed: ValueError: no"):
        child.ask("fail")
    assert child.ask("bytes") == {"size": 3}
    assert child.read(3) == b"a\nb"
    assert child.ask([2]) == {"asked": [2]}


def test_its_death_is_told_with_its_last_words(child: LineChild) -> None:
    for _ in range(2):
        with pytest.raises(VerificationError, match=r"process of it died \(exit 4\): the last words"):
            child.ask("die")


@pytest.mark.slow
def test_a_line_without_an_end_is_not_read_to_it(child: LineChild) -> None:
    with pytest.raises(VerificationError, match="died"):
        child.ask("long")


def test_closing_ends_what_it_started(child: LineChild) -> None:
    pids = child.ask("start")["pids"]
    child.close()
    child.close()
    wait_until(lambda: all(map(gone, pids)))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at the death of a parent")
def test_a_killed_parent_leaves_no_child_even_a_busy_one(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    (pid,) = map(int, parent.stdout.readline().split())
    assert not gone(pid)
    parent.kill()
    parent.communicate()
    wait_until(lambda: gone(pid))
