"""What all clients share: memory for bodies, connections, places in the queue; and who may send anything at all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from qwen_onnx.runtime.server.admission import Gate, Watch
from qwen_onnx.runtime.server.faults import handle_errors
from qwen_onnx.runtime.server.keys import KeyRing, digest_of
from qwen_onnx.runtime.server.metrics import Metrics
from qwen_onnx.runtime.server.settings import ServerSettings
from tests.fixtures.servers import CHAT, Guarded, body, guarded

ALICE, BOB = "qo-alice-0123456789", "qo-bob-0123456789"
KEYS = KeyRing({digest_of(ALICE): "alice", digest_of(BOB): "bob"})
JSON = {"content-type": "application/json"}


class Behind:
    """An application behind the gate, without a socket; ``bodies`` is what has reached it."""

    def __init__(self, **settings: Any) -> None:
        self.bodies: list[bytes] = []
        self.hold = asyncio.Event()
        self.hold.set()
        watch = Watch(Metrics(lambda: None, lambda: 0))  # type: ignore[arg-type,return-value]
        given = ServerSettings(**settings)
        self._gate = Gate(self._app, given, KeyRing({}), watch, frozenset((CHAT, "/health/live")), frozenset((CHAT,)))

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        self.bodies.append(message.get("body", b""))
        await self.hold.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask(
        self, pieces: AsyncIterator[bytes], *, path: str = CHAT, method: str = "POST", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer."""
        sent: list[Any] = []
        named = {"host": "localhost", **{name.replace("_", "-"): value for name, value in headers.items()}}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(name.encode(), value.encode()) for name, value in named.items()],
            "client": ("127.0.0.1", 1),
        }

        async def receive() -> dict[str, Any]:
            async for piece in pieces:
                return {"type": "http.request", "body": piece, "more_body": True}
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await self._gate(scope, receive, send)
        told = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], told, sent[1]["body"]


async def pieces(*contents: bytes, then: asyncio.Event | None = None) -> AsyncIterator[bytes]:
    for content in contents:
        yield content
    if then:
        await then.wait()


def message_of(answer: bytes) -> str:
    told: str = json.loads(answer)["error"]["message"]
    return told


@pytest.mark.parametrize(("method", "path"), [("POST", "/"), ("GET", "/health/live"), ("POST", "/none"), ("GET", CHAT)])
def test_routes_without_bodies_are_given_none(method: str, path: str) -> None:
    async def ask() -> list[bytes]:
        behind = Behind()
        sent = pieces(b'{"a": 1, "a": 1}', b"x" * 100_000)
        status, _, _ = await behind.ask(sent, path=path, method=method, content_length="100016", **CONTENT)
        assert status == 200, "it was read and refused"
        return behind.bodies

    assert asyncio.run(ask()) == [b""]


CONTENT = {"content_type": "application/json"}


def test_an_endless_body_that_nobody_takes_is_let_go() -> None:
    async def ask() -> tuple[int, dict[str, str], bytes]:
        behind = Behind(body_seconds=0.1)
        sent = pieces(b"x", then=asyncio.Event())
        return await asyncio.wait_for(behind.ask(sent, path="/", transfer_encoding="chunked"), 20)

    status, headers, _ = asyncio.run(ask())
    assert (status, headers["connection"]) == (200, "close")


def test_the_bodies_of_all_requests_share_one_memory() -> None:
    async def ask() -> None:
        behind = Behind(max_buffered_bytes=20_000)
        finish = asyncio.Event()
        first = asyncio.create_task(behind.ask(pieces(b"[" + b" " * 15_000, b"1]", then=finish), **CONTENT))
        await asyncio.sleep(0)
        status, headers, answer = await behind.ask(pieces(b" " * 15_000), **CONTENT)
        assert (status, headers["retry-after"]) == (503, "5")
        assert "memory" in message_of(answer)
        finish.set()
        assert (await first)[0] == 200
        # what a request held is free again when it has ended
        assert (await behind.ask(pieces(b"[1]" + b" " * 15_000), **CONTENT))[0] == 200

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"sec_fetch_site": "same-origin", "origin": "http://localhost"}, 200),
        ({"sec_fetch_site": "none"}, 200),
        ({"sec_fetch_site": "cross-site", "origin": "https://page.example"}, 200),
        ({"sec_fetch_site": "cross-site", "origin": "https://evil.example"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site", "origin": "http://localhost:3000"}, 403),
    ],
)
def test_pages_elsewhere_may_not_call_the_api(headers: dict[str, str], status: int) -> None:
    async def ask() -> int:
        behind = Behind(cors_origins=("https://page.example",))
        return (await behind.ask(pieces(b"{}"), **CONTENT, **headers))[0]

    assert asyncio.run(ask()) == status


def test_the_chat_page_opens_from_a_link_elsewhere() -> None:
    async def ask() -> int:
        return (await Behind().ask(pieces(), path="/", method="GET", sec_fetch_site="cross-site"))[0]

    assert asyncio.run(ask()) == 200


def test_a_body_without_content_type_goes_no_further() -> None:
    """A page elsewhere can send one without a preflight; old releases of FastAPI take it for JSON."""

    async def ask() -> list[bytes]:
        behind = Behind()
        status, _, answer = await behind.ask(pieces(json.dumps(body()).encode()))
        assert status == 400
        assert "Content-Type" in message_of(answer)
        return behind.bodies

    assert asyncio.run(ask()) == []


def test_the_end_of_the_grace_time_is_told_as_json() -> None:
    async def ask() -> tuple[int, dict[str, str], bytes]:
        behind = Behind()
        behind.hold.clear()
        asking = asyncio.create_task(behind.ask(pieces(b"{}"), **CONTENT))
        while not behind.bodies:
            await asyncio.sleep(0)
        asking.cancel("Task cancelled, timeout graceful shutdown exceeded")
        return await asking

    status, headers, answer = asyncio.run(ask())
    assert (status, headers["content-type"], headers["connection"]) == (503, "application/json", "close")
    assert "shutting down" in message_of(answer)


class Numbers(BaseModel):
    model_config = ConfigDict(extra="forbid")
    numbers: list[int] = []


def test_many_faults_make_a_short_answer() -> None:
    app = FastAPI()
    handle_errors(app)

    @app.post("/")
    def numbers(given: Numbers) -> None:
        pass

    async def ask(content: Any) -> dict[str, Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            answer = await client.post("/", json=content)
        assert answer.status_code == 400
        told: dict[str, Any] = answer.json()["error"]
        return told

    told = asyncio.run(ask({"numbers": ["secret"] * 5000}))
    assert told["message"].count("numbers.") == 10
    assert "4990 more faults" in told["message"]
    assert "secret" not in told["message"]
    told = asyncio.run(ask({"x" * 1_000_000: 1}))
    assert len(json.dumps(told)) < 5000


def test_a_long_name_is_not_sent_back(tiny_artifact: Path) -> None:
    with guarded(tiny_artifact, ServerSettings()) as running:
        answer = running.ask(model="x" * 1_000_000)
        assert answer.status_code == 404
        assert len(answer.content) < 5000


@pytest.fixture(scope="module")
def keyed(tiny_artifact: Path):  # type: ignore[no-untyped-def]
    settings = ServerSettings(max_concurrent=2, rate_limit=1000, max_connections=12, max_tokens=5000)
    with guarded(tiny_artifact, settings, keys=KEYS) as running:
        yield running


def test_one_key_cannot_hold_every_place(keyed: Guarded) -> None:
    refused = keyed.ask(ALICE, n=3)
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "rate_limit_error"
    # 1 is the end of an answer
    long = body(n=2, max_tokens=5000, stream=True, logit_bias={"1": -100})
    with keyed.http.stream("POST", CHAT, json=long, headers={"authorization": f"Bearer {ALICE}"}) as held:
        # kept: httpx closes the connection of an iterator that is thrown away
        lines = held.iter_lines()
        next(lines)
        assert keyed.ask(ALICE).status_code == 429
        assert keyed.ask(BOB).status_code == 200
    until_served(lambda: keyed.ask(ALICE).status_code)


def until_served(ask: Callable[[], int]) -> None:
    """What an answer held is free again soon after its end."""
    for _ in range(50):
        if ask() == 200:
            return
    pytest.fail("the places were not given back")


def test_connections_beyond_the_limit_are_closed(keyed: Guarded) -> None:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", keyed.port), timeout=20)) for _ in range(12)]
        head = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        held[0].sendall(head)
        assert held[0].recv(20).startswith(b"HTTP/1.1 200")
        # the client of this module may hold one too; these cannot all be within the limit
        late = [stack.enter_context(socket.create_connection(("127.0.0.1", keyed.port), timeout=20)) for _ in range(4)]
        assert late[-1].recv(20) == b""
    assert keyed.http.get("/health/live").status_code == 200


def test_the_documentation_needs_nothing_from_elsewhere(keyed: Guarded) -> None:
    answer = keyed.http.get("/docs", headers={"authorization": f"Bearer {ALICE}"})
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "<script" not in answer.text
    assert "//" not in answer.text
    assert "POST /v1/chat/completions" in answer.text
    assert keyed.http.get("/redoc", headers={"authorization": f"Bearer {ALICE}"}).status_code == 404
