"""``qwen-onnx list``, ``select``, ``plan`` and ``plans``: what there is to build. Nothing is built here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from qwen_onnx.cli.options import (
    AsJson,
    Model,
    Precision,
    RecipeOption,
    SourceOption,
    Target,
    cache_here,
    catalog_here,
    of_folder,
    wanted,
)
from qwen_onnx.errors import ConfigError
from qwen_onnx.processes.progress import progress

TASKS = ("general", "coding", "math", "vision", "audio")
out = Console()


def list_models(
    text: Annotated[str, typer.Argument(help="show only models whose id contains this")] = "",
    as_json: AsJson = False,
    recipe: RecipeOption = None,
) -> None:
    """Models and the targets that recipes exist for; what cannot be built yet says why."""
    from qwen_onnx.catalog.select import HEADERS, columns, listing, reasons, target_lines

    catalog = catalog_here(recipe)
    shown = [row for _, row in catalog.rows.values() if text.lower() in row.id]
    if not shown:
        raise ConfigError([f"recipes/: no model's id contains {text!r}"], hint="qwen-onnx list")
    if as_json:
        print(json.dumps(listing(shown, catalog)))
        return
    table = Table(*(Column(name, no_wrap=index == 0, overflow="fold") for index, name in enumerate(HEADERS)), box=None)
    for row in shown:
        table.add_row(*(escape(cell) for cell in columns(row, catalog)))
    out.print(table)
    for line in reasons(shown):
        out.print(escape(line))
    for row in shown:
        if file := catalog.own_file_of(row.id):
            out.print(escape(f"own, not in the catalogue: {row.id} of {file}"), soft_wrap=True)
    for line in target_lines(catalog):
        out.print(escape(line), highlight=False)


def select_models(
    ram: Annotated[str, typer.Option(help="memory that the served model may take, e.g. 8GB")],
    task: Annotated[str, typer.Option(help="general, coding, math, vision or audio")] = "general",
    device: Annotated[str, typer.Option(help="cpu, gpu or npu, or a target, see `qwen-onnx list`")] = "cpu",
    context: Annotated[str, typer.Option(help="tokens of prompt and answer, e.g. 32k")] = "4k",
    language: Annotated[str | None, typer.Option(help="ISO 639-1 code, e.g. pl")] = None,
    license: Annotated[str | None, typer.Option(help="commercial: only licences that allow it")] = None,
    most: Annotated[int, typer.Option(min=1, help="how many to show")] = 5,
    as_json: AsJson = False,
    recipe: RecipeOption = None,
) -> None:
    """Models that fit this memory, context and task, best first, with the reasons and the next command."""
    from qwen_onnx.catalog.select import BYTE_UNITS, TOKEN_UNITS, Wish, count, marked, parse_amount, select, uncounted

    faults = [] if task in TASKS else [f"--task: {task!r} is none of {', '.join(TASKS)}"]
    faults += [] if license in (None, "commercial") else [f"--license: {license!r} is not `commercial`"]
    if faults:
        raise ConfigError(faults)
    tokens = parse_amount(context, TOKEN_UNITS, "--context")
    wish = Wish(parse_amount(ram, BYTE_UNITS, "--ram"), task, tokens, language, license is not None)
    catalog = catalog_here(recipe)
    choices = select(catalog, wish, device)[:most]
    for line in uncounted(catalog):
        progress(line)
    if not choices:
        raise ConfigError(["no model fits"], hint="give more --ram, a shorter --context, or drop a condition")
    following = choices[0].command
    if as_json:
        print(json.dumps({"choices": [choice.told() for choice in choices], "next": following}))
        return
    table = Table(Column("model", no_wrap=True), "weights", "why")
    for choice in choices:
        table.add_row(
            marked(choice.row, choice.recipe), count(choice.row.parameters), escape("; ".join(choice.reasons))
        )
    out.print(table)
    out.print(escape(f"next: {following}"), soft_wrap=True)


def plan(
    model: Model,
    target: Target = "cpu",
    precision: Precision = None,
    full: bool = typer.Option(False, help="print the whole plan"),
    estimate: bool = typer.Option(
        False, "--estimate", help="print what the build needs instead: disk, memory, artifact"
    ),
    source: SourceOption = None,
    recipe: RecipeOption = None,
) -> None:
    """Print the complete Olive config of MODEL on a target as JSON; nothing runs."""
    # an estimate reads the shape of a source; its name alone needs a digest of all its weights
    asked = wanted(model, target, precision, None if estimate else source, recipe)
    made = asked.plan
    if estimate:
        from qwen_onnx.build.estimate import print_estimate
        from qwen_onnx.sources.fetch import checkpoint_at_hand

        print_estimate(made, checkpoint_at_hand(made, cache_here(), source or asked.source), out)
        return
    progress(f"{made.name}: verification level: {made.verification.text}")
    print(json.dumps(made.model_dump(mode="json") if full else made.olive, indent=2))


def where(
    model: Model,
    target: Target = "cpu",
    precision: Precision = None,
    recipe: RecipeOption = None,
    source: SourceOption = None,
) -> None:
    """Print the folder of MODEL's artifact on a target, built or not; no hub is asked."""
    from qwen_onnx.artifact.manifest import MANIFEST
    from qwen_onnx.catalog.load import work_root
    from qwen_onnx.catalog.reference import id_of, parse

    if source:
        print(work_root() / "artifacts" / wanted(model, target, precision, source, recipe).plan.name)
        return
    catalog, asked = catalog_here(recipe), parse(model)
    place = work_root() / "artifacts" / id_of(catalog, asked) / f"{target}-{catalog.precision(target, precision)}"
    if isinstance(asked, Path) and (place / MANIFEST).exists():
        of_folder([place], asked)
    print(place)


def plans(
    check: bool = typer.Option(False, "--check", help="fail when recipes/plans.lock or the schemas are stale"),
) -> None:
    """Check every recipe on every target and write recipes/plans.lock, golden plans and JSON Schemas."""
    from qwen_onnx.catalog import generated
    from qwen_onnx.catalog.load import find_root, load_catalog
    from qwen_onnx.release import matrix

    # what is committed is the catalogue's; recipes of the user's own have no place in it
    catalog = load_catalog(find_root())
    stale = []
    for name, text in (generated.committed_files(catalog) | matrix.committed_files(catalog)).items():
        path = catalog.root / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            out.print(f"wrote {name}")
    if check and stale:
        raise ConfigError([f"{name}: stale" for name in stale], hint="make plans, then commit")
    if not stale:
        out.print("plans, golden plans and schemas are up to date")
