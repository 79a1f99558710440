"""The chat page: static files that talk to the API of the server they come from, and to nothing else."""

from __future__ import annotations

import html
from functools import cache
from importlib.resources import files

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

TYPES = {
    "app.js": "text/javascript",
    "conversation.js": "text/javascript",
    "markdown.js": "text/javascript",
    "stream.js": "text/javascript",
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
}
# the page needs its own scripts, styles, icon and API; what a model says can reach nothing else
HEADERS = {
    "Content-Security-Policy": "; ".join(
        [
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "connect-src 'self'",
            "img-src 'self'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
            "form-action 'none'",
        ]
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # a page of an earlier version must not meet a server of a later one
    "Cache-Control": "no-cache",
}
MODEL_PLACE = "{{model}}"


def make_web_router(model_name: str) -> APIRouter:
    """GET / and the files that the page loads, for the model that the page shall ask."""
    router = APIRouter(include_in_schema=False)
    page = _read("index.html").decode("utf-8").replace(MODEL_PLACE, html.escape(model_name))

    @router.get("/")
    async def index() -> Response:
        return Response(page, headers=HEADERS, media_type="text/html")

    @router.get("/static/{name}")
    async def static(name: str) -> Response:
        if name not in TYPES:
            raise HTTPException(404, f"there is no file {name}")
        return Response(_read(name), headers=HEADERS, media_type=TYPES[name])

    return router


@cache
def _read(name: str) -> bytes:
    return (files("qwen_onnx.runtime.server.web") / "static" / name).read_bytes()
