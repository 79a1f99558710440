"""The HTTP server: one model, safe by default, and watched."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response

from qwen_onnx import __version__
from qwen_onnx.errors import EnvironmentFault, WorkerDiedError
from qwen_onnx.runtime.server import logs
from qwen_onnx.runtime.server.adapter_folder import AdapterFolder
from qwen_onnx.runtime.server.admission import Gate, Watch
from qwen_onnx.runtime.server.api import CLAMPED, make_router
from qwen_onnx.runtime.server.faults import handle_errors
from qwen_onnx.runtime.server.fetching import Fetcher
from qwen_onnx.runtime.server.keys import KeyRing
from qwen_onnx.runtime.server.listening import Server, make_config
from qwen_onnx.runtime.server.metrics import CONTENT_TYPE, Metrics
from qwen_onnx.runtime.server.settings import ServerSettings
from qwen_onnx.runtime.server.tracing import Tracer, make_tracer
from qwen_onnx.runtime.server.web import MediaLimits, make_web_router
from qwen_onnx.runtime.server.web.docs import make_docs_router
from qwen_onnx.runtime.service.generation import GenerationConfig
from qwen_onnx.runtime.service.monitor import QwenMonitor
from qwen_onnx.runtime.service.qwen import QwenService
from qwen_onnx.runtime.service.secure import GuardedService
from qwen_onnx.runtime.service.senses import MOST_PICTURES, MOST_SOUNDS

SNIPPET = """\
{model} at {url}

curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
{authorization}  -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="{key}")
answer = client.chat.completions.create(model="{model}", messages=[{{"role": "user", "content": "Hello"}}])
print(answer.choices[0].message.content)
"""


def create_app(
    service: QwenService,
    model_name: str,
    settings: ServerSettings | None = None,
    *,
    keys: KeyRing | None = None,
    tracer: Tracer | None = None,
) -> FastAPI:
    """The application around a running service, which it closes at its end.

    Args:
        settings: None: the defaults, under any Host, for a server that somebody else's program runs.
        keys: None: no keys are asked for.

    Raises:
        ConfigError: clients may load adapters, and there are no keys or no such folder.
    """
    settings = settings or ServerSettings(allowed_hosts=("*",))
    monitor = QwenMonitor(service)
    metrics = Metrics(service.stats, lambda: int(psutil.Process().memory_info().rss))
    keys = keys or KeyRing({})
    settings.check_adapters(keyed=len(keys) > 0)
    policy = settings.policy(keyed=len(keys) > 0)
    if policy.max_concurrent is None and len(keys) > 1:
        # one of several must not keep all the others out
        policy = dataclasses.replace(policy, max_concurrent=max(1, (settings.streams + settings.queue_size) // 2))
    guarded = GuardedService(service, policy, (monitor.add, metrics.generation))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(guarded.close)
        if tracer:
            await asyncio.to_thread(tracer.close)

    # FastAPI's own pages of documentation load scripts from elsewhere; ours has none
    app = FastAPI(title="qwen-onnx", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.draining = False
    handle_errors(app)
    _add_health(app, model_name, monitor)

    @app.get("/metrics", response_class=PlainTextResponse)
    def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    fetcher = Fetcher(settings.fetch_images) if settings.fetch_images else None
    folder = AdapterFolder(settings.adapter_folder, settings.adapter_budget) if settings.adapter_folder else None
    app.include_router(make_router(guarded, model_name, fetcher, folder))
    app.include_router(make_web_router(model_name, _media_limits(service, settings)))
    paths = app.openapi()["paths"]
    app.include_router(make_docs_router(app.openapi()))
    app.openapi_schema = None
    app.add_middleware(
        Gate,
        settings=settings,
        keys=keys,
        watch=Watch(metrics, tracer),
        routes=frozenset({*paths, "/", "/docs", "/openapi.json"}),
        bodies=frozenset(path for path, methods in paths.items() if "post" in methods),
    )
    if settings.cors_origins:
        # outermost: a browser's preflight carries no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After", CLAMPED],
        )
    return app


def _media_limits(service: QwenService, settings: ServerSettings) -> MediaLimits | None:
    # what decodes them is there when a model sees or hears
    if service.sees:
        from qwen_onnx.runtime.processing.images import FORMATS, ImageLimits

        pictures = {f"image/{name.lower()}": name.lower() for name in FORMATS}
        return MediaLimits("picture", MOST_PICTURES, ImageLimits().most_bytes, settings.max_body_bytes, pictures)
    if service.hears:
        from qwen_onnx.runtime.processing.audio import MEDIA_TYPES, SoundLimits

        most = SoundLimits().most_bytes
        return MediaLimits("sound", MOST_SOUNDS, most, settings.max_body_bytes, MEDIA_TYPES, service.longest_sound)
    return None


def _add_health(app: FastAPI, model_name: str, monitor: QwenMonitor) -> None:
    """Probes: whether the process answers, and whether it should get requests."""

    @app.get("/health/live", responses={503: {"description": "nothing but a new start helps"}})
    async def live() -> JSONResponse:
        failed = monitor.failed
        return JSONResponse({"status": "failed" if failed else "ok", "model": model_name}, 503 if failed else 200)

    @app.get("/health/ready", responses={503: {"description": "unhealthy, or about to end"}})
    async def ready() -> JSONResponse:
        health = monitor.health_check()
        told: dict[str, Any] = dataclasses.asdict(health)
        if app.state.draining:
            told["status"] = "draining"
        return JSONResponse(told, 503 if told["status"] in ("unhealthy", "draining") else 200)


def load_service(
    folder: Path,
    settings: ServerSettings,
    threads: int | None,
    expect: str | None = None,
    adapters: Mapping[str, Path] | None = None,
) -> QwenService:
    """The model in a child process, verified there, which has answered once.

    Raises:
        ArtifactError: it does not load, is not whole, or is not the expected one; an adapter does not fit it.
        ConfigError: an adapter cannot be called so.
    """
    service = QwenService(
        folder,
        threads=threads,
        isolated=True,
        streams=settings.streams,
        queue_size=settings.queue_size,
        context=settings.context,
        speculate=settings.speculate,
        verify=True,
        expect=expect,
        adapters=adapters,
        adapter_budget=settings.adapter_budget if settings.adapter_folder else None,
        kv_cache=settings.kv_cache,
    )
    service.generate("Hello", GenerationConfig(max_new_tokens=1))
    return service


def serve(
    folder: Path,
    *,
    model_name: str,
    settings: ServerSettings,
    threads: int | None = None,
    expect: str | None = None,
    adapters: Mapping[str, Path] | None = None,
) -> None:
    """Load the model in a child process and serve until SIGTERM or SIGINT; running answers may end in the grace time.

    Args:
        expect: the digest of what is to be served, see ``artifact.seal.runnable_digest``.
        adapters: files by name, see ``QwenService``.

    Raises:
        ArtifactError: the folder holds no model that loads, or not the expected one; an adapter does not fit it.
        ConfigError: keys that cannot be read; a name that no adapter can have; reachable from outside without any.
        EnvironmentFault: the port is taken; ``otlp`` without its extra.
        WorkerDiedError: the model's process died again and again.
    """
    keys = KeyRing.load(settings.keys, os.environ)
    settings.check_exposure(keyed=bool(keys))
    settings.check_adapters(keyed=bool(keys))
    logs.configure()
    tracer = make_tracer(settings.otlp, model_name) if settings.otlp else None
    service = load_service(folder, settings, threads, expect, adapters)
    app = create_app(service, model_name, settings, keys=keys, tracer=tracer)

    def drain() -> None:
        app.state.draining = True

    def failed() -> bool:
        return service.stats().failed

    def greet(port: int) -> None:
        print(greeting(model_name, settings.host, port, keyed=bool(keys)), flush=True)

    try:
        Server(make_config(app, settings), greet, drain, failed).run()
    except SystemExit as error:
        raise EnvironmentFault(
            f"cannot listen at {settings.host}:{settings.port}", hint="use another --port; 0 picks a free one"
        ) from error
    if failed():
        raise WorkerDiedError("the engine's process died again and again", hint="the log above says how it ended")


def greeting(model: str, host: str, port: int, *, keyed: bool) -> str:
    """The address, and how to use it: ready to be copied."""
    # one cannot connect to "every address"
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    authorization = "  -H 'Authorization: Bearer YOUR_KEY' \\\n" if keyed else ""
    key = "YOUR_KEY" if keyed else "none"
    return SNIPPET.format(model=model, url=f"http://{name}:{port}", authorization=authorization, key=key)
