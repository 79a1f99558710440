"""The server as a Ray Serve deployment: replicas of one application, each with a model of its own.

``python -m qwen_onnx.runtime.server.ray_serve ARTIFACT --replicas 2 --port 8000`` starts a Ray of its own on this
machine. To run on a cluster that is there already, give ``deployment`` to ``serve.run``. Ray spreads the requests,
starts a replica again that died, and stops sending to one whose ``check_health`` fails. Every answer names its
replica in ``X-Replica``. https://docs.ray.io/en/latest/serve/http-guide.html
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from qwen_onnx.errors import ConfigError, EnvironmentFault, WorkerDiedError, run
from qwen_onnx.runtime.server.app import create_app, load_service
from qwen_onnx.runtime.server.keys import KeyRing
from qwen_onnx.runtime.server.settings import ServerSettings
from qwen_onnx.runtime.service.qwen import QwenService

APPLICATION = "qwen-onnx"
# Ray's least; nothing of ours goes through the object store
OBJECT_STORE_BYTES = 80 << 20
# the application refuses by itself what is too much: Ray's default, 5, would hold it back and tell nobody
MOST_ONGOING = 256
GRACE_S = 30.0

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Named:
    """An ASGI application whose answers name the replica that gave them."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]], service: QwenService, name: str):
        self._app, self.service, self._header = app, service, (b"x-replica", name.encode())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass everything on, the name added."""

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), self._header]
            await send(message)

        await self._app(scope, receive, named)


def check(service: QwenService) -> None:
    """WorkerDiedError when the process that holds the model is gone."""
    if not service.stats().alive:
        raise WorkerDiedError("the engine's process died")


def deployment(
    folder: Path,
    model_name: str,
    *,
    replicas: int,
    threads: int,
    settings: ServerSettings | None = None,
    keys: KeyRing | None = None,
) -> Any:
    """A Ray Serve application, for ``serve.run``.

    Args:
        folder: of the artifact, at the same place on every machine that runs a replica.
        threads: of onnxruntime in each replica, and CPUs that Ray reserves for it.
        settings, keys: those of ``create_app``. Each replica counts the requests of a key by itself.

    Raises:
        EnvironmentFault: Ray is not installed. ConfigError: adapters are to be loaded while it runs.
    """
    if settings is not None and settings.adapter_folder is not None:
        fault = "adapter_folder: a request reaches one of the replicas, and the others would lack its adapter"
        raise ConfigError([fault], hint="serve without replicas: qwen-onnx serve ARTIFACT --adapter-folder FOLDER")
    serve = _ray_serve()

    def build() -> Named:
        service = load_service(folder, settings or ServerSettings(), threads)
        return Named(
            create_app(service, model_name, settings, keys=keys),
            service,
            serve.get_replica_context().replica_id.unique_id,
        )

    class Replica:
        def check_health(self) -> None:
            check(self.app.service)  # type: ignore[attr-defined]  # of Ray's wrapper

    options = {
        "name": "server",
        "num_replicas": replicas,
        "max_ongoing_requests": MOST_ONGOING,
        "ray_actor_options": {"num_cpus": threads},
        "health_check_period_s": 2,
        "health_check_timeout_s": 10,
        "graceful_shutdown_timeout_s": GRACE_S,
    }
    return serve.deployment(**options)(serve.ingress(build)(Replica)).bind()


def _ray_serve() -> Any:
    # read when Ray is imported: no statistics leave this machine, and Ray's own ports, which listen on every address
    # whatever it is told, ask for a token
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        from ray import serve
    except ImportError as error:
        raise EnvironmentFault("Ray Serve is not installed", hint="pip install 'qwen-onnx[ray]'") from error
    return serve


def serve_replicas(folder: Path, model_name: str, settings: ServerSettings, *, replicas: int, threads: int) -> None:
    """Start Ray and the replicas, and serve until SIGTERM or SIGINT; what runs then may end within ``GRACE_S``.

    Raises:
        ConfigError: keys that cannot be read; reachable from outside without any.
        EnvironmentFault: Ray is not installed.
        RuntimeError: of Ray, when the replicas do not start.
    """
    keys = KeyRing.load(settings.keys, os.environ)
    settings.check_exposure(keyed=bool(keys))
    serve = _ray_serve()
    import ray

    asked_to_stop = threading.Event()

    def stop_when_told() -> None:
        # again after each step of Ray's: it sets handlers of its own, which would end this process at once
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: asked_to_stop.set())

    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, replicas * threads),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        stop_when_told()
        serve.start(http_options={"host": settings.host, "port": settings.port})
        stop_when_told()
        application = deployment(
            folder, model_name, replicas=replicas, threads=threads, settings=settings, keys=keys if keys else None
        )
        if not asked_to_stop.is_set():
            serve.run(application, name=APPLICATION)
            stop_when_told()
            print(f"{replicas} replicas of {model_name} at http://{settings.host}:{settings.port}", flush=True)
        asked_to_stop.wait()
        serve.delete(APPLICATION)
    finally:
        serve.shutdown()
        ray.shutdown()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    from qwen_onnx.artifact.manifest import open_runnable

    parser = argparse.ArgumentParser(
        prog="python -m qwen_onnx.runtime.server.ray_serve", description="serve by replicas"
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime in each replica")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--keys", type=Path, help="file of API keys; other settings: QWEN_ONNX_* in the environment")
    parser.add_argument("--name", help="model name in the API; default: the recipe's id")
    given = parser.parse_args(arguments)
    opened = open_runnable(given.artifact.resolve())
    name = given.name or opened.manifest.plan.model
    settings = ServerSettings.read(os.environ, host=given.host, port=given.port, keys=given.keys)
    serve_replicas(opened.path, name, settings, replicas=given.replicas, threads=given.threads)
    return 0


if __name__ == "__main__":
    run(main)
