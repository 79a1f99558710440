"""GET /docs: what the API has, as one page without scripts and without anything from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from qwen_onnx.runtime.server.web import HEADERS

PAGE = """\
<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title><link rel="icon" href="/static/icon.svg"></head>
<body>
<h1>{title}</h1>
<p>The schema of every request and answer: <a href="/openapi.json">/openapi.json</a>.
The forms are those of OpenAI's API, so that its clients work.</p>
{routes}
</body>
</html>
"""


def make_docs_router(schema: Mapping[str, Any]) -> APIRouter:
    """The page, made once of the application's OpenAPI ``schema``."""
    router = APIRouter(include_in_schema=False)
    title = html.escape(f"{schema['info']['title']} {schema['info']['version']}")
    page = PAGE.format(title=title, routes="\n".join(_routes(schema)))

    @router.get("/docs")
    async def docs() -> Response:
        return Response(page, headers=HEADERS, media_type="text/html")

    return router


def _routes(schema: Mapping[str, Any]) -> list[str]:
    """A section for each route: what it does, and what it answers."""
    made = []
    for path, methods in schema["paths"].items():
        for method, told in methods.items():
            answers = "".join(
                f"<dt>{html.escape(status)}</dt><dd>{html.escape(answer['description'])}</dd>"
                for status, answer in told["responses"].items()
            )
            text = html.escape(told.get("description") or told.get("summary", ""))
            made.append(f"<h2>{method.upper()} {html.escape(path)}</h2>\n<p>{text}</p>\n<dl>{answers}</dl>")
    return made
