"""``qwen-onnx publish`` and ``qwen-onnx pull``: packages leave this machine and come back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qwen_onnx.errors import EnvironmentFault, PublishError
from qwen_onnx.processes.progress import progress

DESTINATION = "a folder, oci:PATH:TAG, oci://HOST/REPOSITORY:TAG, hf://ORG/NAME[@REVISION] or ms://ORG/NAME"
PlainHttp = Annotated[bool, typer.Option("--plain-http", help="allow http to a registry beyond this machine")]


@contextmanager
def _extra() -> Iterator[None]:
    """Only the client of the place that is asked for is loaded; one that is not installed is named."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise EnvironmentFault(f"{error.name} is not installed", hint="pip install 'qwen-onnx[publish]'") from error


def publish(
    package: Annotated[Path, typer.Argument(help="folder of a package, see `qwen-onnx package`")],
    destination: Annotated[str, typer.Argument(help=DESTINATION)],
    private: Annotated[
        bool, typer.Option("--private", help="create the repository as private if it does not exist")
    ] = False,
    plain_http: PlainHttp = False,
) -> None:
    """Verify PACKAGE and publish it; only a verdict of PASS leaves. Prints one line of JSON."""
    from qwen_onnx.publish.transfer import publish_package

    with _extra():
        receipt = publish_package(package.resolve(), destination, progress, private=private, plain_http=plain_http)
    print(json.dumps({key: value for key, value in asdict(receipt).items() if value is not None}))


def pull(
    source: Annotated[str, typer.Argument(help=DESTINATION)],
    output: Annotated[
        Path | None, typer.Option(help="the package's own folder; default: its name in artifacts/packages")
    ] = None,
    expect: Annotated[str | None, typer.Option(help="the digest that `publish` printed; refuse any other")] = None,
    plain_http: PlainHttp = False,
) -> None:
    """Download a package, verify it and put it in place. Prints its folder and one line of JSON."""
    import re

    from qwen_onnx.catalog.load import work_root
    from qwen_onnx.publish.transfer import pull_package

    if expect is not None and not re.fullmatch("[0-9a-f]{64}", expect):
        raise PublishError("--expect is not a SHA-256 in hex", hint="take `digest` from the output of publish")
    target = output.resolve() if output else None
    parent = target.parent if target else (work_root() / "artifacts/packages").resolve()
    with _extra():
        got = pull_package(source, parent, progress, target=target, expect=expect, plain_http=plain_http)
    print(got.package.path)
    print(
        json.dumps(
            {
                "id": got.package.record.id,
                "digest": got.digest,
                "path": str(got.package.path),
                "received": got.moved,
                "present": got.present,
            }
        )
    )
