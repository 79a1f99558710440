"""Answers on their way, in events or whole, and clients that leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qwen_onnx.errors import QwenOnnxError, RequestError
from qwen_onnx.runtime.server.api.chat_response import sse
from qwen_onnx.runtime.server.api.protocol import REFUSALS, error_body
from qwen_onnx.runtime.service.generations import Generations

T = TypeVar("T")
EVENT_STREAM = "text/event-stream"
# nginx's name for "no request": a status that nobody receives, for the logs
CLIENT_LEFT = 499


class ClientLeft(Exception):
    """Nobody waits for the answer."""


async def unless_left(request: Request, work: Coroutine[None, None, T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves.

    Raises:
        ClientLeft: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for other in (task, gone):
            other.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events; the generations stop when it ends, also when the client leaves before the first event."""

    def __init__(self, events: AsyncIterator[str], running: Generations, headers: Mapping[str, str]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        super().__init__(_or_error(events), media_type=EVENT_STREAM, headers=headers)
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()


async def _or_error(events: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield event
    except QwenOnnxError as error:
        # the status line is long gone: an error event is what the openai client raises from
        kind = "invalid_request_error" if isinstance(error, RequestError) else "server_error"
        yield sse(error_body(error.what, kind=kind, param=error.where))


def documented(events: str) -> dict[int | str, dict[str, Any]]:
    """Responses of a route that streams; ``events`` are what it streams."""
    # OpenAPI 3.2 has a schema for the whole stream and one for each event
    event = {
        "type": "object",
        "required": ["data"],
        "properties": {name: {"type": "string"} for name in ("event", "data")},
    }
    stream = {"schema": {"type": "string"}, "itemSchema": event}
    whole = {"description": f"The answer; with stream set {events}", "content": {EVENT_STREAM: stream}}
    return {**REFUSALS, 200: whole}


async def answered(
    request: Request,
    running: Generations,
    stream: bool | None,
    headers: Mapping[str, str],
    events: Callable[[], AsyncIterator[str]],
    whole: Callable[[], Coroutine[None, None, bytes]],
    media_type: str = "application/json",
) -> Response:
    """Events or a whole answer of ``media_type``, unless the client leaves."""
    if stream:
        return EventStream(events(), running, headers)
    try:
        return Response(await unless_left(request, whole()), media_type=media_type, headers=headers)
    except ClientLeft:
        return Response(status_code=CLIENT_LEFT)
    finally:
        running.cancel()
