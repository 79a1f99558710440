"""A server in a process of its own, watched from outside: what the benchmark and the soak test stand on."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import psutil

from qwen_onnx.errors import EnvironmentFault, ServiceError

if TYPE_CHECKING:
    import httpx

LOOPBACK = "127.0.0.1"
START_S, STOP_S = 180.0, 30.0


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


class LiveServer:
    """A server process for the length of a with block.

    Args:
        module: what ``python -m`` runs.
        arguments: its arguments; ``--port`` and a free port are added.

    Raises:
        ServiceError: it ended, or did not answer within ``START_S`` seconds; with its last words.
    """

    def __init__(self, module: str, arguments: Sequence[str]) -> None:
        self.port = free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        self._command = [sys.executable, "-m", module, *arguments, "--port", str(self.port)]
        # a pipe that nobody reads would stop the server when it is full
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # open for the length of the with block

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=subprocess.STDOUT)
        self.process = psutil.Process(self._process.pid)
        deadline = time.monotonic() + START_S
        try:
            while not self._answers():
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise ServiceError(f"the server does not answer:\n{self.log()[-2000:]}", where=self.url)
                time.sleep(0.05)
            [model] = self.get_json("/v1/models")["data"]
            self.model: str = model["id"]
        except BaseException:
            self.stop()
            raise
        return self

    def _answers(self) -> bool:
        try:
            return bool(self.get_json("/v1/models"))
        # a proxy, Ray's for one, listens before there is somebody to pass requests to
        except (OSError, http.client.HTTPException, ServiceError):
            return False

    def get_json(self, path: str) -> dict[str, Any]:
        """The JSON of a GET; OSError when nobody listens, ServiceError when the status is not 200."""
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=START_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise ServiceError(f"GET {path} gives {answer.status}: {body[:200]!r}", where=self.url)
        told: dict[str, Any] = json.loads(body)
        return told

    def processes(self) -> list[psutil.Process]:
        """The server and all its children."""
        return [self.process, *self.process.children(recursive=True)]

    def resident_bytes(self) -> int:
        """Sum over ``processes``; pages that they share count for each."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def log(self) -> str:
        """What it has said so far."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def stop(self) -> int:
        """SIGTERM, and SIGKILL to whatever is left after ``STOP_S`` seconds; the exit code of the server."""
        family = self.processes() if self.process.is_running() else []
        self._process.terminate()
        try:
            code = self._process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return code

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._log.close()


@dataclass
class Answer:
    """A chat completion as a client sees it; times are those of ``time.perf_counter``, in seconds.

    Args:
        arrivals: when each piece of text came; one entry for an answer that is not streamed.
        usage: the server's token counts; empty when it told none.
        fault: what broke: an error event in the stream, or a stream without its end.
    """

    status: int
    begin: float
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    fault: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds until the first piece of text; NaN when none came."""
        return self.arrivals[0] - self.begin if self.arrivals else float("nan")

    @property
    def tokens_per_piece(self) -> float:
        """A piece may hold several tokens: a character of several bytes, or what a stop string held back."""
        return float(self.usage.get("completion_tokens", len(self.arrivals))) / max(len(self.arrivals), 1)


OnPiece = Callable[[int], bool]


async def stream_chat(client: httpx.AsyncClient, body: dict[str, Any], on_piece: OnPiece | None = None) -> Answer:
    """Stream one chat completion with its usage.

    Args:
        on_piece: told how many pieces came so far; when it says False, the client hangs up.

    Raises:
        httpx.HTTPError: the connection failed or timed out.
    """
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    done, answer = False, Answer(0, time.perf_counter())
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        answer.status = response.status_code
        if response.status_code != 200:
            answer.fault = (await response.aread()).decode(errors="replace")
            return answer
        async for line in _lines(response):
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]":
                done = True
                continue
            read_event(answer, json.loads(line[6:]))
            if on_piece and answer.arrivals and not on_piece(len(answer.arrivals)):
                return answer
    if not done and answer.fault is None:
        answer.fault = "the stream has no end"
    return answer


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Lines of server-sent events. httpx's own end at U+0085 and U+2028 as well, which may stand within the JSON."""
    rest = b""
    async for data in response.aiter_bytes():
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r")


def read_event(answer: Answer, event: dict[str, Any]) -> None:
    """Add one event of a stream to ``answer``."""
    if "error" in event:
        answer.fault = json.dumps(event["error"])
        return
    answer.usage = event.get("usage") or answer.usage
    for choice in event["choices"]:
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason
        delta = choice["delta"]
        text = (delta.get("content") or "") + (delta.get("reasoning_content") or "")
        if text:
            answer.text += text
            answer.arrivals.append(time.perf_counter())


def http_client(base_url: str, *, connections: int, timeout: float, **options: Any) -> httpx.AsyncClient:
    """A client with a connection for each of ``connections`` requests and ``timeout`` seconds of patience.

    Raises:
        EnvironmentFault: httpx is not installed; the extra ``serve`` does without.
    """
    try:
        import httpx
    except ImportError as error:
        raise EnvironmentFault("httpx is not installed", hint="pip install httpx") from error
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    # a proxy of the environment has no business between this process and its own child
    return httpx.AsyncClient(base_url=base_url, limits=limits, timeout=timeout, trust_env=False, **options)
