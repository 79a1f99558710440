"""A child under limits: what it cannot do, how it ends, and that the next question is answered all the same."""

from __future__ import annotations

import gc
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from qwen_onnx.errors import EnvironmentFault
from qwen_onnx.processes.limited import Limited, LimitReached, Limits
from tests.fixtures.servers import until

LIMITS = Limits(memory=64 << 20, cpu_seconds=1, seconds=60, answer_bytes=1 << 20)


@pytest.fixture(scope="module")
def child() -> Iterator[Limited]:
    running = Limited("tests.processes.strange", LIMITS)
    yield running
    running.close()


def ask(child: Limited, kind: str, value: Any = None, seconds: float | None = None) -> Any:
    return child.ask({"kind": kind, "value": value}, seconds)


@pytest.mark.parametrize("value", [None, "x" * 500_000, "\ud800\u2028\n", {"a": [1.5, True]}])
def test_it_answers(child: Limited, value: Any) -> None:
    assert ask(child, "echo", value) == value


def test_it_stays_between_two_answers(child: Limited) -> None:
    assert ask(child, "pid") == ask(child, "pid")


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("fill", 100 << 20, "more than 64 MiB of memory"),
        ("spin", None, "more than 1 s of processor time"),
        ("exit", 3, "exit code 3"),
        ("echo", "x" * (2 << 20), "more than 1048576 bytes"),
    ],
)
def test_a_limit_ends_it_and_another_starts(child: Limited, kind: str, value: Any, expected: str) -> None:
    before = ask(child, "pid")
    with pytest.raises(LimitReached, match=expected):
        ask(child, kind, value)
    assert ask(child, "pid") != before
    assert not psutil.pid_exists(before)


def test_time_on_the_clock_ends_it_too(child: Limited) -> None:
    with pytest.raises(LimitReached, match=r"more than 0\.2 s$"):
        ask(child, "sleep", 600, seconds=0.2)
    assert ask(child, "echo", 1) == 1


def test_it_reaches_neither_files_nor_network_nor_secrets(
    child: Limited, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text("secret")
    assert "OSError" in ask(child, "read", str(tmp_path / "secret"))
    assert "OSError" in ask(child, "write", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert "OSError" in ask(child, "connect", listening.getsockname()[1])
    monkeypatch.setenv("QWEN_ONNX_API_KEYS", "secret")
    fresh = Limited("tests.processes.strange", LIMITS)
    assert ask(fresh, "variable", "QWEN_ONNX_API_KEYS") is None
    fresh.close()


def test_many_threads_have_their_turns(child: Limited) -> None:
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda value=value: found.update({value: ask(child, "echo", value)}))  # type: ignore[misc]
        for value in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {value: value for value in range(20)}


def test_close_ends_it_in_the_middle_of_an_answer() -> None:
    child = Limited("tests.processes.strange", LIMITS)
    pid = ask(child, "pid")
    faults: list[Exception] = []

    def wait() -> None:
        try:
            ask(child, "sleep", 600)
        except LimitReached as error:
            faults.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    until(child._lock.locked)
    child.close()
    waiting.join(timeout=30)
    assert len(faults) == 1
    assert not psutil.pid_exists(pid)
    with pytest.raises(LimitReached, match="closed"):
        ask(child, "pid")


def test_who_is_forgotten_leaves_no_process() -> None:
    child = Limited("tests.processes.strange", LIMITS)
    pid = ask(child, "pid")
    del child
    gc.collect()
    assert not psutil.pid_exists(pid)


def test_one_that_does_not_start_is_told() -> None:
    with pytest.raises(EnvironmentFault, match="does not start") as caught:
        Limited("tests.processes.nothing", LIMITS).ask(1)
    assert "import tests.processes.nothing" in str(caught.value)
