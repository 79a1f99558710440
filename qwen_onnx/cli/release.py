"""``qwen-onnx release``: every job of a matrix, and one folder with what passed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from qwen_onnx.cli.options import RecipeOption, cache_here, catalog_here
from qwen_onnx.errors import ConfigError, ReleaseError


def release(
    matrix: Annotated[Path | None, typer.Argument(help="what to build; default pipelines/release.yaml")] = None,
    output: Annotated[Path | None, typer.Option(help="folder of the release; default artifacts/release")] = None,
    artifacts: Annotated[
        Path | None, typer.Option(help="folder that artifacts are built in, or found; default: that of --output")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="a job, e.g. 'starter/cpu-*'; repeatable")] = None,
    source: Annotated[list[str] | None, typer.Option(help="MODEL=PATH: local weights of a model; repeatable")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="jobs to run at once here; they disturb each other's speeds")] = 1,
    on: Annotated[
        Literal["local", "ray"], typer.Option(help="run on this machine, or on a running Ray cluster")
    ] = "local",
    address: Annotated[
        str, typer.Option(help="address of the Ray cluster; auto: the one this machine belongs to")
    ] = "auto",
    fresh: Annotated[bool, typer.Option(help="rebuild what is already there")] = False,
    recipe: RecipeOption = None,
) -> None:
    """Build, prove and package every job of a matrix. Exits non-zero unless every job passed."""
    from rich.console import Console

    from qwen_onnx.artifact.checksums import SUMS
    from qwen_onnx.catalog.load import work_root
    from qwen_onnx.files import sha256_of
    from qwen_onnx.release.board import Board
    from qwen_onnx.release.matrix import load_matrix
    from qwen_onnx.release.run import ReleaseOrder
    from qwen_onnx.release.run import release as run
    from qwen_onnx.release.summary import json_line, print_summary

    catalog = catalog_here(recipe)
    place = (output or work_root() / "artifacts/release").resolve()
    order = ReleaseOrder(
        catalog,
        load_matrix(catalog, matrix),
        output=place,
        artifacts=(artifacts or place.parent).resolve(),
        cache=cache_here().resolve(),
        only=tuple(only or ()),
        sources=_sources(source or []),
        workers=jobs,
        fresh=fresh,
        on=on,
        address=address,
    )
    with Board(Console(stderr=True)) as board:
        made, folder = run(order, board.say)
    print_summary(made, Console(width=None if sys.stdout.isatty() else 120))
    print(json_line(made, folder, sha256_of(folder / SUMS)))
    if not made.passed:
        failed = [job.name for job in made.jobs if not job.passed]
        raise ReleaseError(
            f"{len(failed)} of {len(made.jobs)} jobs failed: {', '.join(failed)}",
            where=str(folder),
            hint=f"read {folder}/logs; the same command goes on with what passed",
        )


def _sources(given: list[str]) -> dict[str, Path]:
    faults, found = [], {}
    for item in given:
        model, equals, path = item.partition("=")
        if not (model and equals and path):
            faults.append(f"--source {item}: give MODEL=PATH")
        elif not Path(path).exists():
            faults.append(f"--source {item}: there is no {path}")
        found[model] = Path(path).resolve()
    if faults:
        raise ConfigError(faults)
    return found
