"""``qwen-onnx doctor`` and ``environments``: what this machine has and lacks."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qwen_onnx.cli.options import AsJson, Model, Precision, RecipeOption, Target, cache_here, catalog_here, wanted

out = Console()


def doctor(
    model: Model = "starter",
    target: Target = "cpu",
    precision: Precision = None,
    as_json: AsJson = False,
    recipe: RecipeOption = None,
) -> None:
    """Check this machine: versions, extras, memory and disk against what a recipe needs. Exits 3 on a fault."""
    from qwen_onnx.build.doctor import examine
    from qwen_onnx.catalog.load import work_root

    asked = wanted(model, target, precision, None, recipe)
    findings = examine(asked.plan, work_root(), asked.source)
    sound = all(finding.ok for finding in findings)
    if as_json:
        print(json.dumps({"ok": sound, "findings": [asdict(finding) for finding in findings]}))
    else:
        table = Table("check", "", "found", "fix")
        for finding in findings:
            mark = "[green]ok[/]" if finding.ok else "[red]fault[/]"
            table.add_row(finding.name, mark, escape(finding.found), escape(finding.fix))
        out.print(table)
    if not sound:
        raise typer.Exit(3)


def environments() -> None:
    """Make the Python environments that some targets need, ahead of their first build."""
    from qwen_onnx.processes.environments import interpreter_of

    for environment in catalog_here().environments.values():
        print(interpreter_of(environment, cache_here()).python)
