"""``qwen-onnx serve`` as a process: what it prints, what it logs, how it ends, and what garbage does to it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.live import LiveServer
from tests.conftest import run_cli
from tests.fixtures.servers import CHAT, until

HELLO = [{"role": "user", "content": "hello"}]


class Process:
    """A server started with ``--port 0``."""

    def __init__(self, artifact: Path, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "qwen_onnx.cli.app", "serve", str(artifact), "--port", "0", "--threads", "1"]
        self.out, self.err = folder / "out", folder / "err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen([*command, *options], stdout=out, stderr=err)
        until(lambda: "http://" in self.out.read_text() or self.process.poll() is not None, 120)
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.out.read_text())
        assert found, self.err.read_text()
        self.port = int(found[1])
        self.model = self.out.read_text().split()[0]
        self.http = httpx.Client(base_url=found[0], timeout=60, trust_env=False)

    def body(self, **changes: Any) -> dict[str, Any]:
        return {"model": self.model, "messages": HELLO, "max_tokens": 8, **changes}

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.err.read_text().splitlines()]


@contextmanager
def process(artifact: Path, folder: Path, *options: str) -> Iterator[Process]:
    running = Process(artifact, folder, *options)
    try:
        with running.http:
            yield running
    finally:
        running.process.kill()
        running.process.wait()


@pytest.fixture
def running(tiny_build: Path, tmp_path: Path) -> Iterator[Process]:
    with process(tiny_build, tmp_path) as started:
        yield started


@pytest.mark.slow
def test_what_it_prints_works_when_copied(running: Process) -> None:
    """The curl command by the shell, the Python snippet by Python."""
    _, curl, snippet = running.out.read_text().rstrip().split("\n\n")
    answer = json.loads(subprocess.run(["sh", "-c", curl], capture_output=True, check=True).stdout)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    subprocess.run([sys.executable, "-c", snippet], capture_output=True, check=True)


@pytest.mark.slow
def test_beyond_loopback_it_wants_keys(tiny_build: Path) -> None:
    done = run_cli("serve", tiny_build, "--host", "0.0.0.0", "--port", 0)
    assert done.returncode == 2
    assert "--insecure" in done.stderr


@pytest.mark.slow
def test_an_artifact_without_scales_is_not_served_with_keys_and_values_in_int8(tiny_build: Path) -> None:
    done = run_cli("serve", tiny_build, "--kv-cache", "int8", "--port", 0)
    assert done.returncode == 6
    assert "no scales for an int8 KV cache" in done.stderr
    assert f"qwen-onnx verify {tiny_build}" in "".join(done.stderr.splitlines())
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_port_that_is_taken_is_told(running: Process, tiny_build: Path) -> None:
    done = run_cli("serve", tiny_build, "--port", running.port)
    assert done.returncode == 3
    assert f"cannot listen at 127.0.0.1:{running.port}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_running_stream_ends_before_the_server_does(running: Process, number: int) -> None:
    with running.http.stream("POST", CHAT, json=running.body(max_tokens=400, stream=True)) as answer:
        lines = answer.iter_lines()
        next(lines)
        running.process.send_signal(number)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert running.process.wait(timeout=30) == 0
    with pytest.raises(httpx.ConnectError):
        running.http.get("/health/live")


@pytest.mark.slow
def test_what_takes_longer_than_the_grace_time_is_cut(tiny_build: Path, tmp_path: Path) -> None:
    with process(tiny_build, tmp_path, "--grace-seconds", "1", "--max-tokens", "8000") as running:
        begun = threading.Event()

        def hold() -> None:
            # never read: the server cannot finish sending
            with running.http.stream("POST", CHAT, json=running.body(max_tokens=7000, stream=True)):
                begun.set()
                running.process.wait(timeout=60)

        holder = threading.Thread(target=hold)
        holder.start()
        assert begun.wait(30)
        begin = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=30) == 0
        assert time.monotonic() - begin < 20
        holder.join()


def words_in(log: str, text: str) -> list[str]:
    """Pieces of ``text``, as they are and as JSON writes them, that stand in ``log``."""
    pieces = [text[index : index + 8] for index in range(0, max(len(text) - 7, 1), 4)]
    return [piece for piece in pieces if piece.strip() and (piece in log or json.dumps(piece)[1:-1] in log)]


SECRET = "zanzibar-7731"


def bad_bodies(running: Process) -> list[Callable[[], httpx.Response]]:
    post = running.http.post
    message = {"role": "user", "content": SECRET}
    surrogate = json.dumps(running.body(messages=[{"role": "user", "content": SECRET + "\ud800"}])).encode()
    return [
        lambda: post(CHAT, json=running.body(messages=[{"role": SECRET, "content": SECRET}])),
        lambda: post(CHAT, json=running.body(messages=[message], **{SECRET: SECRET})),
        lambda: post(CHAT, json=running.body(messages=SECRET)),
        lambda: post(CHAT, json=running.body(messages=[message], temperature=SECRET)),
        lambda: post(CHAT, json=running.body(messages=[message], model=SECRET)),
        lambda: post(CHAT, json=running.body(messages=[message], max_tokens=10**6)),
        lambda: post(CHAT, json=running.body(messages=[{"role": "user", "content": SECRET * 1000}])),
        lambda: post(CHAT, content=f'{{"messages": "{SECRET}'.encode(), headers={"content-type": "application/json"}),
        lambda: post(CHAT, content=SECRET.encode(), headers={"content-type": "text/plain"}),
        lambda: post(CHAT, content=surrogate, headers={"content-type": "application/json"}),
        lambda: running.http.get(f"/{SECRET}?{SECRET}", headers={"x-request-id": f"<{SECRET}>"}),
        lambda: running.http.get("/v1/models", headers={"host": SECRET}),
        lambda: post(CHAT, json=running.body(messages=[message]), headers={"host": SECRET}),
    ]


@pytest.mark.slow
def test_no_word_of_prompt_or_answer_stands_in_the_log(tiny_build: Path, tmp_path: Path) -> None:
    strict = ("--max-input-characters", "8192", "--max-tokens", "1024")
    with process(tiny_build, tmp_path, "--rate-limit", "14", *strict) as running:
        message = {"role": "user", "content": f"tell me of {SECRET}"}
        # sampled: the greedy answer of a random model is one character again and again
        asked = running.body(messages=[message], max_tokens=40, temperature=1.0, seed=3)
        whole = running.http.post(CHAT, json=asked)
        streamed = running.http.post(CHAT, json={**asked, "stream": True})
        assert (whole.status_code, streamed.status_code) == (200, 200)
        answer = whole.json()["choices"][0]["message"]["content"]
        for bad in bad_bodies(running):
            assert 400 <= bad().status_code < 500
        late = [running.http.post(CHAT, json=running.body(messages=[message])).status_code for _ in range(4)]
        assert late[-1] == 429
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(timeout=30)
        log, lines = running.err.read_text(), running.log_lines()
    assert len(answer) > 8
    assert words_in(f"log with {answer}", answer), "the search itself must find"
    assert not words_in(log, answer)
    assert "zanzibar" not in log
    told = [line for line in lines if line["logger"] == "qwen_onnx.request"]
    assert len(told) == 2 + 13 + 4
    good = told[0]
    assert {"time", "level", "request_id", "route", "status", "prompt_tokens", "completion_tokens"} <= set(good)
    assert {"ttft", "duration", "finish_reason", "prompt_hmac"} <= set(good)
    assert (good["route"], good["status"], good["completion_tokens"]) == (CHAT, 200, 40)
    assert told[1]["prompt_hmac"] == good["prompt_hmac"]
    assert {line["reason"] for line in told if line["status"] == 429} == {"rate_limit"}


@pytest.mark.slow
def test_the_server_says_when_its_worker_dies(tiny_build: Path) -> None:
    with LiveServer(
        "qwen_onnx.cli.app", ["serve", str(tiny_build), "--threads", "1", "--max-tokens", "8000"]
    ) as server:
        [worker] = [child for child in server.processes()[1:] if "spawn_main" in " ".join(child.cmdline())]
        client = httpx.Client(base_url=server.url, timeout=60, trust_env=False)
        # a tiny model says a thousand tokens in a tenth of a second, and the worker shall die before the end
        body = {"model": server.model, "messages": HELLO, "max_tokens": 7000, "logit_bias": {"1": -100}, "stream": True}
        with client, client.stream("POST", CHAT, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            worker.kill()
            assert any('"error"' in line for line in lines)
        until(lambda: httpx.get(f"{server.url}/health/ready", trust_env=False).status_code == 200)
        until(
            lambda: (
                httpx.post(f"{server.url}{CHAT}", json={**body, "stream": False, "max_tokens": 4}).status_code == 200
            )
        )
        assert "qwen_onnx_engine_restarts_total 1.0" in httpx.get(f"{server.url}/metrics", trust_env=False).text
