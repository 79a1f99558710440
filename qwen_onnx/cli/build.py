"""``qwen-onnx fetch``, ``optimize``, ``verify`` and ``compare``: a checkpoint becomes an artifact, and is measured."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from qwen_onnx.cli.options import (
    ARTIFACT,
    AdapterOption,
    Depth,
    Model,
    Precision,
    RecipeOption,
    SourceOption,
    Target,
    artifact_at,
    cache_here,
    chosen,
    wanted,
)
from qwen_onnx.errors import ArtifactError, ConfigError, VerdictError
from qwen_onnx.processes.progress import progress

if TYPE_CHECKING:
    from qwen_onnx.catalog.plan import Plan
    from qwen_onnx.verify.records import VerifyOptions

out = Console()


def fetch(
    model: Model,
    source: SourceOption = None,
    dither: int | None = typer.Option(
        None, help="seed: write a copy with noise of half a 4-bit step, to test quantisers"
    ),
    output: Path | None = typer.Option(None, help="folder for the dithered copy"),
    recipe: RecipeOption = None,
    adapter: AdapterOption = None,
) -> None:
    """Fetch and verify the checkpoint of MODEL; prints its folder."""
    from qwen_onnx.sources.fetch import fetch as fetch_source

    asked = wanted(model, "cpu", source=source, recipes=recipe)
    plan = _with_adapter(asked.plan, adapter)
    checkpoint = fetch_source(plan, cache_here(), local=asked.source, adapter=adapter, progress=progress)
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


def optimize(
    model: Model,
    target: Target = "cpu",
    precision: Precision = None,
    source: SourceOption = None,
    output: Path | None = typer.Option(
        None, help="artifact folder; default artifacts/MODEL/TARGET-PRECISION; what else is there stays"
    ),
    verify: bool = typer.Option(True, help="measure against PyTorch before publishing"),
    wait: bool = typer.Option(True, help="wait while another build of the same artifact runs"),
    force: bool = typer.Option(False, help="rebuild even if the same artifact exists; replace one of other weights"),
    recipe: RecipeOption = None,
    depth: Depth = "quick",
    max_size: Annotated[
        str | None, typer.Option(help="most bytes of the model's files, e.g. 105MB: the best that keeps to them")
    ] = None,
    max_kld: Annotated[
        float | None, typer.Option(help="most KLD that the quantiser may predict: the smallest that keeps to it")
    ] = None,
    adapter: AdapterOption = None,
    adapter_rank: Annotated[
        int | None,
        typer.Option(help="leave slots for adapters of this rank at most, which `serve --adapter` fills; cpu alone"),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="UTF-8 text like what the model will read: half of what calibrates")
    ] = None,
) -> None:
    """Build, verify and publish an artifact. Exits non-zero unless the verdict is PASS."""
    from qwen_onnx.build.optimize import Job
    from qwen_onnx.build.optimize import optimize as run
    from qwen_onnx.catalog.load import work_root

    asked = wanted(model, target, precision, source, recipe)
    plan = _with_adapter(_bounded(asked.plan, max_size, max_kld), adapter)
    if adapter_rank is not None:
        from qwen_onnx.catalog.slots import slotted

        plan = slotted(plan, adapter_rank)
    plan, text = _calibrated(plan, calibration)
    where = output or work_root() / "artifacts" / plan.name
    job = Job(
        plan,
        where.resolve(),
        cache_here(),
        asked.source,
        adapter,
        text,
        verify=verify,
        wait=wait,
        force=force,
        by_name=output is None,
        depth=depth,
    )
    outcome = run(job)
    manifest = outcome.artifact.manifest
    if outcome.hit:
        progress(f"already built with the same recipe, source and packages: {_shown(outcome.artifact.path)}")
    else:
        progress(f"published {_shown(outcome.artifact.path)} ({manifest.size_bytes / 1e6:.1f} MB)")
    _show_report(outcome.artifact.path, manifest.verdict)


def _with_adapter(plan: Plan, adapter: Path | None) -> Plan:
    """The plan with the adapter in this folder merged, if one is given."""
    if adapter is None:
        return plan
    from qwen_onnx.catalog.plan import adapted
    from qwen_onnx.sources.adapter import open_adapter

    return adapted(plan, open_adapter(adapter).adapted())


def _bounded(plan: Plan, max_size: str | None, max_kld: float | None) -> Plan:
    if max_size is None and max_kld is None:
        return plan
    from qwen_onnx.catalog.plan import bounded
    from qwen_onnx.catalog.select import BYTE_UNITS, parse_amount

    if max_kld is not None and not 0 < max_kld < math.inf:
        raise ConfigError([f"--max-kld {max_kld:g}: not a number above 0"])
    size = None if max_size is None else parse_amount(max_size, BYTE_UNITS, "--max-size")
    return bounded(plan, max_bytes=size, max_kld=max_kld)


def _calibrated(plan: Plan, file: Path | None) -> tuple[Plan, str | None]:
    if file is None:
        return plan, None
    from qwen_onnx.catalog.plan import calibrated
    from qwen_onnx.export.calibration import read_own_text

    text = read_own_text(file)
    return calibrated(plan, hashlib.sha256(text.encode("utf-8")).hexdigest()), text


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
        hint = f"open {_shown(artifact / 'report.html')}"
        if verdict == "INCONCLUSIVE":
            hint += f"; bounds too wide to decide: qwen-onnx verify {_shown(artifact)}, on a quiet machine"
        raise VerdictError(f"the verdict is {verdict}", where=_shown(artifact), hint=hint)


def verify(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help=ARTIFACT)],
    source: SourceOption = None,
    depth: Depth = "quick",
    device: str | None = typer.Option(
        None, help="cpu, cuda, dml or webgpu: prove it there by its golden file, without PyTorch and checkpoint"
    ),
    golden: Path | None = typer.Option(None, help="with --device: another golden.npz than the artifact's own"),
    record: Path | None = typer.Option(
        None, help="with --device: where the record goes; default ARTIFACT.DEVICE.json beside the artifact"
    ),
    sign: Annotated[
        Path | None, typer.Option(help="with --device: SSH key that signs the record; `verify-package` checks it")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="benchmarks that both sides answer, e.g. gsm8k,hellaswag; names of lm-eval")
    ] = None,
    recovery: Annotated[
        float | None, typer.Option(help="least share of PyTorch's accuracy that the artifact keeps; default: 0.95")
    ] = None,
    items: Annotated[int | None, typer.Option(help="of each benchmark, from its beginning; default: all")] = None,
    hub: Annotated[bool, typer.Option("--hub", help="items from the hub, also where a package has some")] = False,
    adapter: AdapterOption = None,
) -> None:
    """Measure an artifact against PyTorch again. Exits non-zero unless the verdict is PASS."""
    if device is None:
        if golden or record or sign:
            raise ConfigError(["--golden, --record and --sign: only with --device"])
        _verify_here(artifact, source, adapter, _with_tasks(depth, tasks, recovery, items, hub))
        return
    if tasks:
        raise ConfigError(["--tasks: not with --device, which has no PyTorch to compare with"])
    if source or adapter:
        raise ConfigError(["--source and --adapter: not with --device, which reads no checkpoint"])
    from qwen_onnx.package import signatures
    from qwen_onnx.verify.device import print_device_report, verify_on

    if sign:
        sign = sign.expanduser()
        signatures.require_signing(sign)
    folder = artifact_at(artifact).resolve()
    report = verify_on(folder, device, golden=golden)
    where = report.save(record or folder.with_name(f"{folder.name}.{device}.json"))
    out.print(f"record: {_shown(where)}", soft_wrap=True)
    # of an earlier run
    signatures.signature_of(where).unlink(missing_ok=True)
    if sign:
        out.print(f"signature: {_shown(signatures.sign(where, sign))}", soft_wrap=True)
    print_device_report(report, out)
    if report.verdict != "PASS":
        raise VerdictError(f"the verdict on {device} is {report.verdict}", where=_shown(folder), hint=str(where))


def _verify_here(artifact: str, source: Path | None, adapter: Path | None, options: VerifyOptions) -> None:
    from qwen_onnx.artifact.manifest import open_artifact
    from qwen_onnx.build.optimize import verify_published
    from qwen_onnx.sources.fetch import fetch as fetch_source
    from qwen_onnx.sources.fetch import weights_of

    place, given = artifact_at(artifact), Path(artifact).expanduser()
    opened = open_artifact(place.resolve())
    # a model that is a folder says where its weights are
    local = source or (given if given.is_dir() and given != place else None)
    if adapter and opened.manifest.plan.adapter is None:
        raise ConfigError([f"--adapter: {artifact} was built without one"])
    checkpoint = fetch_source(opened.manifest.plan, cache_here(), local=local, adapter=adapter, progress=progress)
    if weights_of(checkpoint.files) != weights_of(opened.manifest.source.files):
        raise ArtifactError(
            "the artifact was built from other weights", where=str(checkpoint.path), hint="--source with those weights"
        )
    report = verify_published(opened, checkpoint, cache_here(), options)
    _show_report(opened.path, report.verdict)


def _with_tasks(depth: Depth, tasks: str | None, recovery: float | None, items: int | None, hub: bool) -> VerifyOptions:
    """Options of a verification that runs benchmarks, where some are named."""
    from qwen_onnx.verify.records import RECOVERY, VerifyOptions
    from qwen_onnx.verify.tasks.items import options_of

    options = VerifyOptions.of(depth)
    if tasks is None:
        given = {"--recovery": recovery is not None, "--items": items is not None, "--hub": hub}
        alone = [f"{name}: only with --tasks" for name, is_given in given.items() if is_given]
        if alone:
            raise ConfigError(alone)
        return options
    asked = options_of(tasks, RECOVERY if recovery is None else recovery, items, hub=hub)
    return options.model_copy(update={"tasks": asked})


def compare(
    model: Model,
    target: Target = "cpu",
    source: SourceOption = None,
    only: Annotated[list[str] | None, typer.Option(help="name of a variant; repeatable")] = None,
    speed: bool = typer.Option(True, help="measure latency too"),
    recipe: RecipeOption = None,
) -> None:
    """Build each variant of pipelines/variants/TARGET.yaml and measure size, drift and speed."""
    from qwen_onnx.build.variants import measure, print_comparison
    from qwen_onnx.catalog.load import load_variants
    from qwen_onnx.catalog.plan import make_variant_plan
    from qwen_onnx.sources.fetch import fetch as fetch_source

    asked = chosen(model, recipe)
    catalog = asked.catalog
    variants = load_variants(catalog.root, target).variants
    unknown = sorted(set(only or ()) - {variant.name for variant in variants})
    if unknown:
        known = ", ".join(variant.name for variant in variants)
        raise ConfigError([f"--only {name}: no such variant; known: {known}" for name in unknown])
    kept = [variant for variant in variants if not only or variant.name in only]
    plans = {variant.name: make_variant_plan(catalog, asked.model, target, variant) for variant in kept}
    scratch = cache_here()
    local = source or asked.folder
    checkpoint = fetch_source(next(iter(plans.values())), scratch, local=local, progress=progress)
    rows: dict[str, dict[str, Any]] = {}
    for name, made in plans.items():
        progress(f"variant {len(rows) + 1} of {len(plans)}: {name}")
        rows[name] = measure(made, checkpoint, scratch, speed=speed)
    print_comparison(rows, out)
