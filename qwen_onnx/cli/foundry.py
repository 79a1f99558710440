"""``qwen-onnx foundry-check``: a package in Foundry Local itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def foundry_check(
    package: Annotated[Path, typer.Argument(help="package folder, e.g. artifacts/packages/starter-int4-generic-cpu-1")],
    seconds: Annotated[float, typer.Option(min=1, help="time limit in seconds")] = 600.0,
) -> None:
    """Use a package in Foundry Local itself, offline. Exits non-zero unless every step succeeds."""
    from qwen_onnx.catalog.load import find_root, load_catalog, work_root
    from qwen_onnx.package.foundry_check import check_in_foundry, report
    from qwen_onnx.sources.fetch import cache_root

    cache = cache_root(work_root())
    outcome = check_in_foundry(package.resolve(), load_catalog(find_root()), cache, seconds=seconds)
    report(outcome, Console())
