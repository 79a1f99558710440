"""The chat page: static files that talk to the API of the server they come from, and to nothing else."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

PLACE = re.compile(r"\{\{(model|media)\}\}")
TYPES = {
    "app.js": "text/javascript",
    "conversation.js": "text/javascript",
    "markdown.js": "text/javascript",
    "media.js": "text/javascript",
    "stream.js": "text/javascript",
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
}
POLICY = "Content-Security-Policy"
# the page needs its own scripts, styles, icon and API; what a model says can reach nothing else
HEADERS = {
    POLICY: "; ".join(
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


@dataclass(frozen=True)
class MediaLimits:
    """What the page lets a user send beside words, as the server does.

    Args:
        kind: what that is. most: in a request; bytes: of one; body: of a whole request.
        types: by media type, what the API calls the format.
        seconds: of one sound.
    """

    kind: Literal["picture", "sound"]
    most: int
    bytes: int
    body: int
    types: Mapping[str, str]
    seconds: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The page shows or plays files that the user chose, before they are sent, under names that it makes."""
        source = {"picture": "img-src 'self' blob:", "sound": "img-src 'self'; media-src blob:"}[self.kind]
        return HEADERS | {POLICY: HEADERS[POLICY].replace("img-src 'self'", source)}


def make_web_router(model_name: str, media: MediaLimits | None = None) -> APIRouter:
    """GET / and the files that the page loads, for the model that the page shall ask.

    Args:
        media: None: the model reads text alone, and the page offers nothing else.
    """
    router = APIRouter(include_in_schema=False)
    told = {"model": model_name, "media": json.dumps(asdict(media)) if media else ""}
    page = _read("index.html").decode("utf-8")
    # in one pass: a model may have the name of a place
    page = PLACE.sub(lambda found: html.escape(told[found[1]]), page)
    headers = media.headers if media else HEADERS

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
