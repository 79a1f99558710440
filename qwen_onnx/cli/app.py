"""The command line. Verbs import what they need when they run: ``--help`` loads no torch."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from qwen_onnx.cli.chat import chat
from qwen_onnx.cli.foundry import foundry_check
from qwen_onnx.cli.options import ArtifactPath, MaxTokens, Temperature, Threads
from qwen_onnx.cli.package import package
from qwen_onnx.cli.progress import progress as _progress
from qwen_onnx.cli.publish import publish, pull
from qwen_onnx.cli.release import release
from qwen_onnx.cli.serve import keys_app, serve
from qwen_onnx.cli.trust import same, verify_package
from qwen_onnx.errors import ArtifactError, ConfigError, QwenOnnxError, VerdictError, printable

if TYPE_CHECKING:
    from qwen_onnx.catalog.plan import Plan

app = typer.Typer(
    name="qwen-onnx",
    help="Any Qwen model, any target: an ONNX artifact that is proven, packaged and served.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="id of a recipe, see `qwen-onnx list`")]
Target = Annotated[str, typer.Option(help="a pipeline, see `qwen-onnx list`")]
Precision = Annotated[str | None, typer.Option(help="int4, int8, fp16 or fp32; default: the target's own")]
SourceOption = Annotated[
    Path | None, typer.Option(help="local checkpoint folder, .gguf or .whl instead of the recipe's sources")
]
TASKS = ("general", "coding", "math")


def _plan(model: str, target: str, precision: str | None = None) -> Plan:
    from qwen_onnx.catalog.load import find_root, load_catalog
    from qwen_onnx.catalog.plan import make_plan

    return make_plan(load_catalog(find_root()), model, target, precision)


def _root() -> Path:
    from qwen_onnx.catalog.load import find_root

    return find_root()


def _work() -> Path:
    from qwen_onnx.catalog.load import work_root

    return work_root()


@app.command("list")
def list_models(
    text: Annotated[str, typer.Argument(help="show only models whose id contains this")] = "",
) -> None:
    """Models and the targets that recipes exist for; what cannot be built yet says why."""
    from qwen_onnx.catalog.load import load_catalog
    from qwen_onnx.catalog.select import HEADERS, columns, reasons, target_lines

    catalog = load_catalog(_root())
    shown = [row for _, row in catalog.rows.values() if text.lower() in row.id]
    if not shown:
        raise ConfigError([f"recipes/: no model's id contains {text!r}"], hint="qwen-onnx list")
    table = Table(*(Column(name, no_wrap=index == 0, overflow="fold") for index, name in enumerate(HEADERS)), box=None)
    for row in shown:
        table.add_row(*(escape(cell) for cell in columns(row, catalog)))
    out.print(table)
    for line in reasons(shown):
        out.print(escape(line))
    for line in target_lines(catalog):
        out.print(escape(line), highlight=False)


@app.command("select")
def select_models(
    ram: Annotated[str, typer.Option(help="memory that the served model may take, e.g. 8GB")],
    task: Annotated[str, typer.Option(help="general, coding or math")] = "general",
    device: Annotated[str, typer.Option(help="cpu, gpu or npu, or a target, see `qwen-onnx list`")] = "cpu",
    context: Annotated[str, typer.Option(help="tokens of prompt and answer, e.g. 32k")] = "4k",
    language: Annotated[str | None, typer.Option(help="ISO 639-1 code, e.g. pl")] = None,
    license: Annotated[str | None, typer.Option(help="commercial: only licences that allow it")] = None,
    most: Annotated[int, typer.Option(min=1, help="how many to show")] = 5,
) -> None:
    """Models that fit this memory, context and task, best first, with the reasons and the next command."""
    from qwen_onnx.catalog.load import load_catalog
    from qwen_onnx.catalog.select import BYTE_UNITS, TOKEN_UNITS, Wish, count, parse_amount, select

    faults = [] if task in TASKS else [f"--task: {task!r} is none of {', '.join(TASKS)}"]
    faults += [] if license in (None, "commercial") else [f"--license: {license!r} is not `commercial`"]
    if faults:
        raise ConfigError(faults)
    tokens = parse_amount(context, TOKEN_UNITS, "--context")
    wish = Wish(parse_amount(ram, BYTE_UNITS, "--ram"), task, tokens, language, license is not None)
    choices = select(load_catalog(_root()), wish, device)[:most]
    if not choices:
        raise ConfigError(["no model fits"], hint="give more --ram, a shorter --context, or drop a condition")
    table = Table(Column("model", no_wrap=True), "weights", "why")
    for choice in choices:
        table.add_row(choice.row.id, count(choice.row.parameters), escape("; ".join(choice.reasons)))
    out.print(table)
    out.print(f"next: make optimize MODEL={choices[0].row.id} TARGET={choices[0].target}")


@app.command()
def plan(
    model: Model,
    target: Target = "cpu",
    precision: Precision = None,
    full: bool = typer.Option(False, help="the whole plan"),
    estimate: bool = typer.Option(False, "--estimate", help="what the build takes instead: disk, memory, artifact"),
    source: SourceOption = None,
) -> None:
    """Print the complete Olive config of MODEL on a target as JSON; nothing runs."""
    made = _plan(model, target, precision)
    if source and not estimate:
        raise ConfigError(["--source: only with --estimate, a plan does not depend on it"])
    if estimate:
        from qwen_onnx.build.estimate import print_estimate
        from qwen_onnx.sources.fetch import cache_root, checkpoint_at_hand

        print_estimate(made, checkpoint_at_hand(made, cache_root(_work()), source), out)
        return
    _progress(f"{made.name}: verification level: {made.verification.text}")
    print(json.dumps(made.model_dump(mode="json") if full else made.olive, indent=2))


@app.command()
def plans(
    check: bool = typer.Option(False, "--check", help="fail when recipes/plans.lock or the schemas are stale"),
) -> None:
    """Check every recipe on every target and write recipes/plans.lock, golden plans and JSON Schemas."""
    from qwen_onnx.catalog import generated
    from qwen_onnx.catalog.load import load_catalog
    from qwen_onnx.release import matrix

    catalog = load_catalog(_root())
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


@app.command()
def fetch(
    model: Model,
    source: SourceOption = None,
    dither: int | None = typer.Option(None, help="seed: copy with noise of half a 4-bit step, to test quantisers"),
    output: Path | None = typer.Option(None, help="folder for the dithered copy"),
) -> None:
    """Fetch and verify the checkpoint of MODEL; prints its folder."""
    from qwen_onnx.sources.fetch import cache_root
    from qwen_onnx.sources.fetch import fetch as fetch_source

    checkpoint = fetch_source(_plan(model, "cpu"), cache_root(_work()), local=source, progress=_progress)
    if dither is None:
        print(checkpoint.path)
        return
    if output is None or output.exists():
        raise ConfigError(["--output: --dither needs a folder that does not exist yet"])
    from qwen_onnx.sources.gguf import write_dithered_checkpoint

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".dither-") as staging:
        write_dithered_checkpoint(checkpoint.path, Path(staging), dither)
        os.chmod(staging, 0o755)
        os.rename(staging, output)
        Path(staging).mkdir()
    print(output)


@app.command()
def optimize(
    model: Model,
    target: Target = "cpu",
    precision: Precision = None,
    source: SourceOption = None,
    output: Path | None = typer.Option(None, help="artifact folder; default artifacts/MODEL/TARGET-PRECISION"),
    verify: bool = typer.Option(True, help="measure against PyTorch before publishing"),
    wait: bool = typer.Option(True, help="wait when another build of the same artifact runs"),
    force: bool = typer.Option(False, help="build even when the same artifact exists"),
) -> None:
    """Build, verify and publish an artifact. Exits non-zero unless the verdict is PASS."""
    from qwen_onnx.build.optimize import Job
    from qwen_onnx.build.optimize import optimize as run
    from qwen_onnx.sources.fetch import cache_root

    made = _plan(model, target, precision)
    where = output or _work() / "artifacts" / made.name
    job = Job(made, where.resolve(), cache_root(_work()), source, verify=verify, wait=wait, force=force)
    outcome = run(job, _progress)
    manifest = outcome.artifact.manifest
    if outcome.hit:
        _progress(f"already built with the same recipe, source and packages: {_shown(outcome.artifact.path)}")
    else:
        _progress(f"published {_shown(outcome.artifact.path)} ({manifest.size_bytes / 1e6:.1f} MB)")
    _show_report(outcome.artifact.path, manifest.verdict)


def _shown(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _show_report(artifact: Path, verdict: str) -> None:
    """Table, place of the report, one line of JSON; a verdict other than PASS is an error."""
    if verdict == "UNVERIFIED":
        out.print(f"not verified: qwen-onnx verify {_shown(artifact)}")
        return
    from qwen_onnx.verify.report import load_report, print_report

    report = load_report(artifact)
    out.print(f"report: {_shown(artifact / 'report.html')}")
    print_report(report, out)
    if verdict != "PASS":
        raise VerdictError(
            f"the verdict is {verdict}", where=_shown(artifact), hint=f"open {_shown(artifact / 'report.html')}"
        )


@app.command()
def verify(artifact: ArtifactPath, source: SourceOption = None) -> None:
    """Measure an artifact against PyTorch again. Exits non-zero unless the verdict is PASS."""
    from qwen_onnx.artifact.manifest import open_artifact
    from qwen_onnx.build.optimize import verify_published
    from qwen_onnx.sources.fetch import cache_root, weights_of
    from qwen_onnx.sources.fetch import fetch as fetch_source

    opened = open_artifact(artifact.resolve())
    made = opened.manifest.plan
    checkpoint = fetch_source(made, cache_root(_work()), local=source, progress=_progress)
    if weights_of(checkpoint.files) != weights_of(opened.manifest.source.files):
        raise ArtifactError(
            "the artifact was built from other weights", where=str(checkpoint.path), hint="--source with those weights"
        )
    report = verify_published(opened, checkpoint, cache_root(_work()), _progress)
    _show_report(opened.path, report.verdict)


@app.command()
def compare(
    model: Model,
    target: Target = "cpu",
    source: SourceOption = None,
    only: Annotated[list[str] | None, typer.Option(help="a variant's name, may be given more than once")] = None,
    speed: bool = typer.Option(True, help="measure latency too"),
) -> None:
    """Build each variant of pipelines/variants/TARGET.yaml and measure size, drift and speed."""
    from qwen_onnx.build.variants import measure, print_comparison
    from qwen_onnx.catalog.load import load_catalog, load_variants
    from qwen_onnx.catalog.plan import make_variant_plan
    from qwen_onnx.sources.fetch import cache_root
    from qwen_onnx.sources.fetch import fetch as fetch_source

    catalog = load_catalog(_root())
    variants = load_variants(catalog.root, target).variants
    unknown = sorted(set(only or ()) - {variant.name for variant in variants})
    if unknown:
        known = ", ".join(variant.name for variant in variants)
        raise ConfigError([f"--only {name}: no such variant; known: {known}" for name in unknown])
    chosen = [variant for variant in variants if not only or variant.name in only]
    plans = {variant.name: make_variant_plan(catalog, model, target, variant) for variant in chosen}
    scratch = cache_root(_work())
    checkpoint = fetch_source(next(iter(plans.values())), scratch, local=source, progress=_progress)
    rows: dict[str, dict[str, Any]] = {}
    for name, made in plans.items():
        _progress(f"variant {len(rows) + 1} of {len(plans)}: {name}")
        rows[name] = measure(made, checkpoint, scratch, speed=speed, progress=_progress)
    print_comparison(rows, out)


@app.command()
def generate(
    artifact: ArtifactPath,
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads standard input")],
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="stop string, may be given more than once")] = None,
    threads: Threads = None,
) -> None:
    """Continue PROMPT as plain text, streaming; prints prompt and continuation."""
    from qwen_onnx.artifact.manifest import open_runnable
    from qwen_onnx.runtime.service.generation import GenerationConfig
    from qwen_onnx.runtime.service.qwen import QwenService

    text = sys.stdin.read() if prompt == "-" else prompt
    config = GenerationConfig(max_new_tokens=max_tokens, temperature=temperature, stop=tuple(stop or ()))
    service = QwenService(open_runnable(artifact.resolve()).path, threads=threads, streams=1)
    sys.stdout.write(text)
    for delta in service.stream(text, config):
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


app.command()(package)
app.command()(verify_package)
app.command()(same)
app.command("foundry-check")(foundry_check)
app.command()(release)
app.command()(publish)
app.command()(pull)
app.command()(chat)
app.command()(serve)
app.add_typer(keys_app, name="keys")


@app.command()
def doctor(model: Model = "starter", target: Target = "cpu", precision: Precision = None) -> None:
    """Check this machine: versions, extras, memory and disk against what a recipe needs."""
    from qwen_onnx.build.doctor import examine

    findings = examine(_plan(model, target, precision), _work())
    table = Table("check", "", "found", "what mends it")
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else "[red]fault[/]"
        table.add_row(finding.name, mark, escape(finding.found), escape(finding.remedy))
    out.print(table)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(3)


@app.command()
def environments() -> None:
    """Make the Python environments that some targets need, ahead of their first build."""
    from qwen_onnx.catalog.load import load_catalog
    from qwen_onnx.processes.environments import interpreter_of
    from qwen_onnx.sources.fetch import cache_root

    catalog = load_catalog(_root())
    for environment in catalog.environments.values():
        print(interpreter_of(environment, cache_root(_work()), _progress).python)


def main() -> None:
    """Entry point: deliberate errors become one message and their exit code."""
    try:
        app()
    except QwenOnnxError as error:
        err.print(f"[bold red]error:[/] {escape(printable(str(error)))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # the reader went away, as `| head` does: not a fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
