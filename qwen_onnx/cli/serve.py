"""``qwen-onnx serve`` and ``qwen-onnx keys``: an artifact behind an HTTP API, and who may use it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from qwen_onnx.cli.options import ArtifactPath, Threads
from qwen_onnx.runtime.server.settings import ServerSettings, variables
from qwen_onnx.runtime.service.policy import STRICT

# options whose name ends in s although each has one value
PLURAL = frozenset({"fetch_images"})
keys_app = typer.Typer(help="API keys of `qwen-onnx serve`.", no_args_is_help=True)


@keys_app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="who will use it; shown in the log")],
    file: Annotated[Path, typer.Option(help="key file; created if missing")],
) -> None:
    """Make an API key: prints it, once; the file keeps a name and a hash."""
    from qwen_onnx.runtime.server.keys import new_key

    print(new_key(name, file))


@keys_app.callback()
def _keys() -> None:
    """API keys of `qwen-onnx serve`."""


def serve(
    artifact: ArtifactPath,
    name: Annotated[str | None, typer.Option(help="model name in the API; default: the recipe's id")] = None,
    threads: Threads = None,
    expect: Annotated[
        str | None,
        typer.Option(help="SHA-256 of its SHA256SUMS (of manifest.json, where there is none); refuse anything else"),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="file of `adapter convert`, asked for as MODEL:NAME; repeatable"),
    ] = None,
    **settings: Any,
) -> None:
    """Serve the artifact at an OpenAI-compatible API."""
    import os

    from qwen_onnx.artifact.manifest import read_manifest
    from qwen_onnx.runtime.engines.adapters import parse_adapters
    from qwen_onnx.runtime.server.app import serve as run

    adapters = parse_adapters(adapter or ())
    read = ServerSettings.read(os.environ, **settings)
    folder = artifact.resolve()
    # the engine's process verifies every byte, this time and whenever it is started anew
    served = name or read_manifest(folder).plan.model
    run(folder, model_name=served, settings=read, threads=threads, expect=expect, adapters=adapters)


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    """An option of the command line that is a field of the settings."""
    listed = isinstance(field.default, tuple)
    flag = "--" + (name.removesuffix("s") if listed and name not in PLURAL else name).replace("_", "-")
    told = f"{field.description}; default: {field.default}" if field.default else field.description
    option = typer.Option(flag, envvar=variables(name), show_default=False, help=told)
    kind: Any = list[str] if listed else field.annotation
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _describe() -> None:
    """Give ``serve`` its options and its help."""
    told = inspect.signature(serve, eval_str=True)
    fixed = [one for one in told.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [_option(name, field) for name, field in ServerSettings.model_fields.items() if field.description]
    serve.__signature__ = told.replace(parameters=[*fixed, *options])  # type: ignore[attr-defined]
    limits = (
        "On loopback without keys the model's context is the only limit; with keys, beyond loopback or with "
        f"--allowed-host the defaults are {STRICT.max_input_characters} characters, {STRICT.max_tokens} tokens and "
        f"{STRICT.rate_limit} requests an hour, and {STRICT.request_seconds:g} s for an answer."
    )
    serve.__doc__ = f"{serve.__doc__}\n\n{limits}"


_describe()
