"""What every request passes before the application sees it, and every answer after: an ASGI middleware.

It stands outside FastAPI: a body is counted, timed and read as JSON here, before anything else may trip over it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.engines.interface import cache_scoped
from qwen_onnx.runtime.server import logs
from qwen_onnx.runtime.server.api.parsed import PARSED
from qwen_onnx.runtime.server.api.protocol import error_body
from qwen_onnx.runtime.server.keys import KeyRing
from qwen_onnx.runtime.server.metrics import Metrics
from qwen_onnx.runtime.server.settings import ServerSettings
from qwen_onnx.runtime.server.tracing import Tracer
from qwen_onnx.runtime.service.limits import RateLimiter, check_token_fields, read_json
from qwen_onnx.runtime.service.told import RequestRecord, current

log = logging.getLogger(__name__)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# a body that is refused is read on for a while: a client that still writes would not see the answer otherwise
MOST_DRAINED = 32 << 20
DRAIN_SECONDS = 5.0
SMALL = 64 << 10
CLOSE = (b"connection", b"close")


class Refused(Exception):
    """A request that goes no further. ``close``: its body may be unread, so the connection ends with the answer."""

    def __init__(
        self,
        status: int,
        message: str,
        reason: str,
        *,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        close: bool = True,
    ) -> None:
        super().__init__(message)
        self.status, self.reason, self.close = status, reason, close
        self.headers = (*headers, CLOSE) if close else headers
        self.body = error_body(printable(message), kind=kind, param=param, code=code)


class Disconnected(Exception):
    """The client went away, or takes nothing of its answer any more."""


def printable(text: str) -> str:
    """An error that quotes lone surrogates could not be sent itself."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass
class Watch:
    """Who is told of requests."""

    metrics: Metrics
    tracer: Tracer | None = None


class Gate:
    """The middleware.

    Args:
        app: the application.
        routes: paths that exist; others are all counted as ``unmatched``.
        clock: seconds, for the rate limit.
    """

    def __init__(
        self,
        app: App,
        settings: ServerSettings,
        keys: KeyRing,
        watch: Watch,
        routes: frozenset[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._settings, self._keys, self._watch, self._routes = app, settings, keys, watch, routes
        self._hosts = settings.hosts()
        self._policy = settings.policy(keyed=len(keys) > 0)
        self._limiter = RateLimiter(self._policy.rate_limit, clock=clock) if self._policy.rate_limit else None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        record = RequestRecord(_request_id(headers), scope["method"])
        path = scope["path"]
        record.route = path if path in self._routes else "unmatched"
        token = current.set(record)
        begin = time.monotonic()
        tracer = self._watch.tracer
        span = tracer.start(headers, record.route, record.method) if tracer else None
        try:
            await self._guarded(scope, headers, receive, _Sender(send, record, self._settings.send_seconds))
        finally:
            current.reset(token)
            matched = getattr(scope.get("route"), "path", None)
            record.route = matched if matched and record.route == "unmatched" else record.route
            if span is not None and tracer:
                tracer.end(span, record)
            self._watch.metrics.request(record.route, record.status, record.reason)
            logs.write(record, time.monotonic() - begin)

    async def _guarded(self, scope: Message, headers: dict[str, str], receive: Receive, send: _Sender) -> None:
        try:
            try:
                key = self._admit(scope, headers, send)
            except Refused:
                await self._drain(receive)
                raise
            content = await self._read(scope, headers, receive)
            with cache_scoped(key) if key else contextlib.nullcontext():
                await self._app(scope, content, send)
        except Refused as refusal:
            send.record.reason = refusal.reason
            await send.answer(refusal.status, refusal.body, refusal.headers)
        except Disconnected:
            send.record.reason = send.record.reason or "disconnected"
            if not send.started:
                # for the log alone: nobody is left to read an answer
                send.record.status = 499
        # whatever it is, the client hears of it, and the log tells the place but not the message, which may quote input
        except Exception as error:
            log.error("a request failed: %s", type(error).__name__, exc_info=error)
            if send.started:
                raise Broken from None
            await send.answer(500, error_body("internal error", kind="server_error"), (CLOSE,))

    def _admit(self, scope: Message, headers: dict[str, str], send: _Sender) -> str:
        """Host, key and rate; Refused when one of them says no. Returns the key, or nothing where none is asked for."""
        path = scope["path"]
        if self._hosts is not None and _host(headers.get("host", "")) not in self._hosts:
            raise Refused(421, "this server is not known by that Host; see --allowed-host", "host")
        key = ""
        if self._keys and not _open(path):
            key = _presented(headers)
            send.record.key = self._keys.name_of(key)
            if send.record.key is None:
                challenge = (b"www-authenticate", b'Bearer realm="qwen-onnx"')
                raise Refused(401, "no valid API key", "unauthorized", headers=(challenge,), code="invalid_api_key")
        if self._limiter and path.startswith("/v1/") and scope["method"] == "POST":
            client = send.record.key or (scope.get("client") or ("unknown",))[0]
            wait = self._limiter.admit(client)
            send.extra = _rate_headers(self._limiter, client)
            if wait:
                retry = (b"retry-after", str(wait).encode())
                raise Refused(
                    429,
                    f"{self._limiter.limit} requests in an hour are allowed; try again in {wait} s",
                    "rate_limit",
                    headers=(retry,),
                    code="rate_limit_exceeded",
                    kind="rate_limit_error",
                )
        return key

    async def _read(self, scope: Message, headers: dict[str, str], receive: Receive) -> Receive:
        """The whole body, checked; what the application receives instead of the connection's messages."""
        most = self._settings.max_body_bytes
        length = headers.get("content-length", "0")
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                more = True
                too_large = length.isdigit() and int(length[:20]) > most
                while more and not too_large:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Disconnected
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    too_large = len(body) > most
        except TimeoutError:
            raise Refused(408, "the body took too long to arrive", "slow") from None
        if too_large:
            body.clear()
            await self._drain(receive)
            raise Refused(413, f"the body exceeds {most} bytes", "body_too_large")
        content = bytes(body)
        if scope["method"] == "POST" and _is_json(headers):
            try:
                # what is long is read in a thread, so that streams go on meanwhile
                long = len(content) > SMALL
                scope[PARSED] = await asyncio.to_thread(self._parsed, content) if long else self._parsed(content)
            except RequestError as error:
                raise Refused(400, error.what, "malformed", param=error.where, close=False) from error
        return _replay(content, receive)

    def _parsed(self, content: bytes) -> Any:
        value = read_json(content, self._settings.max_json_depth)
        if self._policy.max_tokens is not None:
            check_token_fields(value, self._policy.max_tokens)
        return value

    async def _drain(self, receive: Receive) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(DRAIN_SECONDS, self._settings.body_seconds)):
                drained = 0
                while drained < MOST_DRAINED:
                    message = await receive()
                    drained += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        return


class Broken(Exception):
    """An answer that had begun cannot be finished; its connection is cut. The cause is in the log already."""


class _Sender:
    """Sends an answer, its headers added; knows what became of it."""

    def __init__(self, send: Send, record: RequestRecord, seconds: float) -> None:
        self._send, self.record, self._seconds = send, record, seconds
        self.started = False
        self.extra: tuple[tuple[bytes, bytes], ...] = ()

    async def __call__(self, message: Message) -> None:
        """See ASGI."""
        if message["type"] == "http.response.start":
            self.started, self.record.status = True, message["status"]
            message["headers"] = self._headers(list(message.get("headers", ())))
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(message)
        except TimeoutError:
            raise Disconnected from None

    def _headers(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Ours, where the application has not said otherwise: the chat page has a policy of its own."""
        ours = [
            (b"x-request-id", self.record.request_id.encode()),
            (b"x-content-type-options", b"nosniff"),
            *self.extra,
        ]
        known = {name.lower() for name, _ in headers}
        return headers + [(name, value) for name, value in ours if name not in known]

    async def answer(self, status: int, body: dict[str, Any], headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        """A JSON answer, unless one has begun."""
        if self.started:
            return
        content = json.dumps(body).encode()
        fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        with contextlib.suppress(Disconnected):
            await self({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
            await self({"type": "http.response.body", "body": content})


def _replay(content: bytes, receive: Receive) -> Receive:
    """The body first, then whatever the connection tells: that the client left."""
    told = False

    async def replayed() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": content, "more_body": False}

    return replayed


def _request_id(headers: dict[str, str]) -> str:
    """The client's, when it cannot forge log lines or headers with it; else a new one."""
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _host(header: str) -> str:
    """The name in a Host header, without port and brackets."""
    name = header.lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0]


def _open(path: str) -> bool:
    """Paths that need no key: probes, and the chat page, which asks for one itself."""
    return path in ("/", "/health/live", "/health/ready") or path.startswith("/static/")


def _presented(headers: dict[str, str]) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _is_json(headers: dict[str, str]) -> bool:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


def _rate_headers(limiter: RateLimiter, client: str) -> tuple[tuple[bytes, bytes], ...]:
    """As OpenAI names them."""
    return (
        (b"x-ratelimit-limit-requests", str(limiter.limit).encode()),
        (b"x-ratelimit-remaining-requests", str(limiter.remaining(client)).encode()),
    )
