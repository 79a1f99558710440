"""``qwen-onnx serve`` and ``qwen-onnx keys``: an artifact behind an HTTP API, and who may use it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwen_onnx.cli.options import ArtifactPath, Threads

keys_app = typer.Typer(help="API keys of `qwen-onnx serve`.", no_args_is_help=True)
DEFAULT = "; else QWEN_ONNX_{}, else {}"


@keys_app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="who will use it: it stands in the log")],
    file: Annotated[Path, typer.Option(help="file of keys; made when it does not exist")],
) -> None:
    """Make an API key: prints it, once; the file keeps a name and a hash."""
    from qwen_onnx.runtime.server.keys import new_key

    print(new_key(name, file))


@keys_app.callback()
def _keys() -> None:
    """API keys of `qwen-onnx serve`."""


def serve(
    artifact: ArtifactPath,
    host: str | None = typer.Option(None, help="address to listen on" + DEFAULT.format("HOST", "127.0.0.1")),
    port: int | None = typer.Option(None, help="0 takes a free one" + DEFAULT.format("PORT", "8000")),
    name: str | None = typer.Option(None, help="model name in the API; default: the recipe's id"),
    threads: Threads = None,
    expect: str | None = typer.Option(
        None, help="SHA-256 of its SHA256SUMS (of manifest.json, where there is none); anything else is refused"
    ),
    keys: Path | None = typer.Option(None, help="file of API keys, see `qwen-onnx keys new`; also QWEN_ONNX_API_KEYS"),
    insecure: bool | None = typer.Option(None, "--insecure", help="listen beyond loopback without API keys"),
    rate_limit: int | None = typer.Option(None, help="requests of a key in an hour; with keys 100, without no limit"),
    max_input_characters: int | None = typer.Option(None, help="of a request's text; default 8192"),
    max_tokens: int | None = typer.Option(None, help="most that a request may ask for; default 1024"),
    request_seconds: float | None = typer.Option(None, help="time for one answer; default 300"),
    grace_seconds: int | None = typer.Option(None, help="time for running answers after SIGTERM; default 30"),
    streams: int | None = typer.Option(None, help="answers at once; default 4"),
    context: int | None = typer.Option(None, help="tokens of a conversation; default: the model's, or what fits"),
    queue_size: int | None = typer.Option(None, help="requests that may wait; default 16"),
    allowed_host: list[str] | None = typer.Option(None, help="a name of this server, as behind a proxy; repeatable"),
    cors_origin: list[str] | None = typer.Option(None, help="pages of this origin may call the API; repeatable"),
    sanitise: bool | None = typer.Option(None, "--sanitise", help="remove scripts, frames and executable URLs"),
    otlp: str | None = typer.Option(None, help="send traces there, e.g. http://localhost:4318/v1/traces"),
) -> None:
    """Serve the artifact at an OpenAI-compatible API.

    Options but --name, --threads and --expect may stand in the environment too: QWEN_ONNX_MAX_TOKENS=512.
    """
    import os

    from qwen_onnx.artifact.manifest import read_manifest
    from qwen_onnx.runtime.server.app import serve as run
    from qwen_onnx.runtime.server.settings import ServerSettings

    settings = ServerSettings.read(
        os.environ,
        host=host,
        port=port,
        keys=keys,
        insecure=insecure,
        rate_limit=rate_limit,
        max_input_characters=max_input_characters,
        max_tokens=max_tokens,
        request_seconds=request_seconds,
        grace_seconds=grace_seconds,
        streams=streams,
        queue_size=queue_size,
        context=context,
        allowed_hosts=tuple(allowed_host) if allowed_host else None,
        cors_origins=tuple(cors_origin) if cors_origin else None,
        sanitise=sanitise,
        otlp=otlp,
    )
    folder = artifact.resolve()
    # the engine's process verifies every byte, this time and whenever it is started anew
    served = name or read_manifest(folder).plan.model
    run(folder, model_name=served, settings=settings, threads=threads, expect=expect)
