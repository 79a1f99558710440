"""The chat page: static files that talk to the API of the server they come from, and to nothing else."""

from __future__ import annotations

import html
import json
import re
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

PLACE = re.compile(r"\{\{(model|pictures)\}\}")
TYPES = {
    "app.js": "text/javascript",
    "conversation.js": "text/javascript",
    "markdown.js": "text/javascript",
    "pictures.js": "text/javascript",
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
# what the page shows of pictures before they are sent are files that the user chose, under names that it makes
SEEING = {
    **HEADERS,
    "Content-Security-Policy": HEADERS["Content-Security-Policy"].replace("img-src 'self'", "img-src 'self' blob:"),
}


@dataclass(frozen=True)
class PictureLimits:
    """What the page lets a user send, as the server does.

    Args:
        most: pictures of a request; bytes: of one; body: bytes of a whole request.
        types: media types that are read.
    """

    most: int
    bytes: int
    body: int
    types: tuple[str, ...]


def make_web_router(model_name: str, pictures: PictureLimits | None = None) -> APIRouter:
    """GET / and the files that the page loads, for the model that the page shall ask.

    Args:
        pictures: None: the model reads text alone, and the page offers no pictures.
    """
    router = APIRouter(include_in_schema=False)
    told = {"model": model_name, "pictures": json.dumps(asdict(pictures)) if pictures else ""}
    page = _read("index.html").decode("utf-8")
    # in one pass: a model may have the name of a place
    page = PLACE.sub(lambda found: html.escape(told[found[1]]), page)
    headers = SEEING if pictures else HEADERS

    @router.get("/")
    async def index() -> Response:
        return Response(page, headers=headers, media_type="text/html")

    @router.get("/static/{name}")
    async def static(name: str) -> Response:
        if name not in TYPES:
            raise HTTPException(404, f"there is no file {name}")
        return Response(_read(name), headers=HEADERS, media_type=TYPES[name])

    return router


@cache
def _read(name: str) -> bytes:
    return (files("qwen_onnx.runtime.server.web") / "static" / name).read_bytes()
