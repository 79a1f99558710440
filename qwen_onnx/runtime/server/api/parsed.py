"""Bodies that were parsed once: what the gate read is what the routes get."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

# where the scope of a request has its body's JSON
PARSED = "qwen_onnx.parsed"


class _ParsedRequest(Request):
    async def json(self) -> Any:
        """What the gate read; without a gate, what the body says."""
        return self.scope[PARSED] if PARSED in self.scope else await super().json()


class ParsedRoute(APIRoute):
    """A route whose body is not parsed a second time."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See ``APIRoute``."""
        handle = super().get_route_handler()

        async def parsed(request: Request) -> Response:
            return await handle(_ParsedRequest(request.scope, request.receive))

        return parsed
