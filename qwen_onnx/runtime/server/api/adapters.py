"""The routes by which whoever has a key loads adapters and drops them. Where there are no keys, they do not exist."""

from __future__ import annotations

import asyncio
import logging
from typing import Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import Field

from qwen_onnx.artifact.adapter_file import NAME_PATTERN
from qwen_onnx.errors import ArtifactError, RequestError
from qwen_onnx.runtime.engines.adapters import Loaded
from qwen_onnx.runtime.server.adapter_folder import AdapterFolder
from qwen_onnx.runtime.server.api.protocol import REFUSALS, ErrorResponse, Strict, error_body
from qwen_onnx.runtime.server.api.served import Served
from qwen_onnx.runtime.service.text import TextService

log = logging.getLogger(__name__)


class AdapterAsked(Strict):
    """Which adapter to load."""

    name: str = Field(
        pattern=f"^{NAME_PATTERN}$", description="Its file in the server's folder is called so, and .safetensors."
    )


class Adapter(Strict):
    """An adapter that this server holds, or can load: of the latter nothing is known but the name.

    ``model`` is what requests ask for; ``removable`` ones count into the budget, and DELETE drops them.
    ``verdict`` is of the training, ``drift`` of answers by an artifact, where that was measured.
    """

    object: Literal["adapter"] = "adapter"
    name: str
    model: str
    loaded: bool
    removable: bool
    bytes: int | None = None
    rank: int | None = None
    targets: list[str] | None = None
    verdict: str | None = None
    drift: str | None = None
    sha256: str | None = None


class AdapterList(Strict):
    """``budget`` is what removable ones may have together, in bytes, and ``used`` what they have."""

    object: Literal["list"] = "list"
    data: list[Adapter]
    used: int
    budget: int


class Dropped(Strict):
    """An adapter that is held no longer."""

    object: Literal["adapter.deleted"] = "adapter.deleted"
    name: str
    deleted: Literal[True] = True


def add_adapters(router: APIRouter, service: TextService, served: Served, folder: AdapterFolder) -> None:
    """Add them to the routes of a server that asks for keys."""
    refusals = {
        **REFUSALS,
        404: {"model": ErrorResponse, "description": "There is no such adapter"},
        409: {"model": ErrorResponse, "description": "Another one has that name, or it is in use"},
    }

    def shown(adapter: Loaded) -> Adapter:
        return Adapter(
            name=adapter.name,
            model=served.name_of(adapter.name),
            loaded=True,
            removable=not adapter.fixed,
            bytes=adapter.bytes,
            rank=adapter.rank,
            targets=list(adapter.targets),
            verdict=adapter.verdict,
            drift=adapter.drift,
            sha256=adapter.digest,
        )

    @router.get("/adapters", responses={"4XX": REFUSALS["4XX"]})
    async def adapters() -> AdapterList:
        """Adapters that are loaded, then those that can be."""
        held, names = service.engine.adapters, await asyncio.to_thread(folder.names)
        known = {adapter.name for adapter in held}
        others = [
            Adapter(name=name, model=served.name_of(name), loaded=False, removable=False)
            for name in names
            if name not in known
        ]
        used = sum(adapter.bytes for adapter in held if not adapter.fixed)
        return AdapterList(data=[*map(shown, held), *others], used=used, budget=folder.budget)

    @router.post("/adapters", response_model=Adapter, responses=refusals)
    async def load(body: AdapterAsked) -> Adapter | JSONResponse:
        """Load an adapter from the server's folder; the least recently used ones that nothing uses make room."""
        file = await asyncio.to_thread(folder.file, body.name)
        if file is None:
            return _no_adapter(body.name)
        try:
            await asyncio.to_thread(service.load_adapter, body.name, file)
        except ArtifactError as error:
            # without its place: a client need not know the server's folders
            raise RequestError(error.what, where="name") from error
        log.info("the adapter %s is loaded", body.name)
        held = next((adapter for adapter in service.engine.adapters if adapter.name == body.name), None)
        return shown(held) if held else _no_adapter(body.name)

    @router.delete("/adapters/{name}", response_model=Dropped, responses=refusals)
    async def unload(name: str) -> Dropped | JSONResponse:
        """Drop an adapter, unless an answer uses it."""
        if name not in service.adapters:
            return _no_adapter(name)
        await asyncio.to_thread(service.unload_adapter, name)
        log.info("the adapter %s is dropped", name)
        return Dropped(name=name)


def _no_adapter(name: str) -> JSONResponse:
    text = f"there is no adapter {name[:80]!r}; GET /v1/adapters lists them"
    return JSONResponse(error_body(text, kind="invalid_request_error", param="name", code="adapter_not_found"), 404)
