"""The main job: plan → checkpoint → Olive → readback → smoke → verify → publish.

Everything happens in a hidden folder beside the target. What is published was built whole, was loaded by
onnxruntime-genai, generated text, and carries its verdict.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_onnx.artifact.kv_scales import KV_SCALES
from qwen_onnx.artifact.manifest import (
    Artifact,
    SourceRecord,
    about_anew,
    build_key,
    cached,
    open_artifact,
    package_versions,
    publish,
    replace_verdict,
    staged_manifest,
)
from qwen_onnx.artifact.origin import origin_of, record_origin, recorded_origin, require_replaceable
from qwen_onnx.artifact.store import build_lock, kept_folder, rejected_place, staging_folder
from qwen_onnx.build.estimate import Estimate, estimate
from qwen_onnx.build.toolchain import Toolchain
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.errors import EnvironmentFault, ExportError
from qwen_onnx.files import APACHE, licence_files
from qwen_onnx.git import this_checkout
from qwen_onnx.processes.environments import is_ready
from qwen_onnx.processes.memory import free_memory
from qwen_onnx.processes.progress import progress
from qwen_onnx.records import Verdict
from qwen_onnx.sources.fetch import Checkpoint, checkpoint_at_hand, expected_revisions, fetch, weights_digest

if TYPE_CHECKING:
    from qwen_onnx.verify.records import Depth, VerifyOptions
    from qwen_onnx.verify.report import Report

LOG_FILE = "build.log"


@dataclass(frozen=True)
class Job:
    """What to build and where.

    Attributes:
        source: local checkpoint folder, GGUF or wheel instead of the recipe's sources.
        target: folder of the artifact.
        cache: downloads and checkpoints.
        adapter: folder of the adapter that the plan names.
        calibration: text of the user's whose digest the plan has.
        verify: measure against PyTorch before publishing.
        wait: wait when another process builds the same artifact.
        by_name: the target follows from the model's name alone, which another model may have, too.
        depth: how much of each kind of text is measured; an artifact that was measured less is measured again.
    """

    plan: Plan
    target: Path
    cache: Path
    source: Path | None = None
    adapter: Path | None = None
    calibration: str | None = None
    verify: bool = True
    wait: bool = True
    force: bool = False
    by_name: bool = False
    depth: Depth = "quick"

    @property
    def options(self) -> VerifyOptions:
        """Of its verification."""
        from qwen_onnx.verify.records import VerifyOptions

        return VerifyOptions.of(self.depth)

    @property
    def origin(self) -> str:
        """What its artifact is made of, here."""
        return origin_of(self.plan, self.source, self.adapter)


@dataclass(frozen=True)
class Outcome:
    """A finished job; ``report`` is None for a cache hit or without verification."""

    artifact: Artifact
    hit: bool
    report: Report | None = None


def optimize(job: Job) -> Outcome:
    """Build, verify and publish an artifact, or find it in place.

    A failed verification still publishes: beside the target, under ``<target>.rejected``, so that it can
    be looked at and the last good artifact stays.

    Raises:
        ArtifactError: something else is in its place.
        QwenOnnxError: any stage failed; nothing was published.
    """
    outcome = _built_or_found(job)
    built = outcome.artifact
    # of the same bytes in two folders the first is the artifact's
    if not (outcome.hit and recorded_origin(built.path, built.manifest)):
        record_origin(built.path, built.manifest.key, job.origin)
    if outcome.hit and job.verify and job.depth != "quick":
        from qwen_onnx.verify.report import load_report

        found = outcome.artifact.path
        if load_report(found).options.depth != job.depth:
            progress(f"measured less deeply so far: verifying again (depth: {job.depth})")
            checkpoint = fetch(job.plan, job.cache, local=job.source, adapter=job.adapter, progress=progress)
            report = verify_published(outcome.artifact, checkpoint, job.cache, job.options)
            return Outcome(open_artifact(found), hit=True, report=report)
    return outcome


def _built_or_found(job: Job) -> Outcome:
    from qwen_onnx.export.code import exporter_digest

    packages = package_versions()
    with build_lock(
        job.target, wait=job.wait, waiting=lambda: progress("another build of this artifact runs: waiting")
    ):
        exporter = exporter_digest(job.plan, job.source)
        pins = expected_revisions(job.plan, job.cache, job.source)
        keys = [build_key(job.plan, pin, packages, exporter) for pin in pins]
        hit = None if job.force else cached(job.target, keys)
        if hit and (hit.manifest.verdict is not Verdict.UNVERIFIED or not job.verify):
            return Outcome(about_anew(hit, job.plan.about), hit=True)
        require_replaceable(job.target, job.plan, job.origin, pins, by_name=job.by_name, force=job.force)
        require_room(job)
        checkpoint = fetch(job.plan, job.cache, local=job.source, adapter=job.adapter, progress=progress)
        key = build_key(job.plan, checkpoint.revision, packages, exporter)
        with kept_folder(job.cache, key, job.target) as kept, staging_folder(job.target) as staging:
            return _build(job, key, packages, checkpoint, staging, kept)


def _warn_of_licence(plan: Plan, checkpoint: Checkpoint) -> None:
    """Before hours of building: what a package of it will lack."""
    if plan.license is None:
        progress("nothing states the weights' licence, and `package` will refuse: README.md beside them should")
    elif plan.license != APACHE and not licence_files(checkpoint.path):
        progress(f"no LICENSE is beside weights under {plan.license}, and `package` will refuse")


def _build(job: Job, key: str, packages: dict[str, str], checkpoint: Checkpoint, staging: Path, kept: Path) -> Outcome:
    from qwen_onnx.build.smoke import smoke

    begin = time.monotonic()
    # before hours of building in which the checkout may move on
    checkout = this_checkout()
    # no model that hears is packaged
    if not job.plan.hears:
        _warn_of_licence(job.plan, checkpoint)
    log, tools = staging / LOG_FILE, Toolchain.of(job.plan, job.cache)
    try:
        folder, readback = build_model(tools, checkpoint, staging, log, kept, job.calibration)
    except ExportError as error:
        raise _with_kept_log(error, log, job) from error
    shutil.move(log, folder / LOG_FILE)
    for file in licence_files(checkpoint.path):
        shutil.copyfile(file, folder / file.name)
    level = smoke(folder, tools, checkpoint.path)
    built = time.monotonic() - begin
    report = _measured(tools, folder, checkpoint, staging, job.options, folder) if job.verify else None
    if report:
        report = _beside_prediction(report, readback.get("predicted"))
        report.save(folder)
        level = report.verification
    verdict = report.verdict if report else Verdict.UNVERIFIED
    manifest = staged_manifest(
        folder,
        level=level,
        key=key,
        plan=job.plan,
        plan_digest=job.plan.digest,
        about=job.plan.about,
        source=SourceRecord(origin=checkpoint.origin, revision=checkpoint.revision, files=checkpoint.files),
        packages=packages,
        checkout=checkout,
        readback=readback,
        verdict=verdict,
        built_seconds=round(built, 1),
    )
    passed = report is None or verdict is Verdict.PASS
    target = job.target if passed else rejected_place(job.target)
    return Outcome(publish(folder, target, manifest), hit=False, report=report)


def _beside_prediction(report: Report, predicted: dict[str, float] | None) -> Report:
    """The report whose check of the drift also says what the quantiser had expected."""
    if predicted is None:
        return report
    told = f"the quantiser predicted a mean KLD of {predicted['kld']:.3f}"
    checks = tuple(
        item.model_copy(update={"detail": f"{item.detail}; {told}" if item.detail else told})
        if item.name == "drift"
        else item
        for item in report.checks
    )
    return report.model_copy(update={"checks": checks})


def build_model(
    tools: Toolchain,
    checkpoint: Checkpoint,
    staging: Path,
    log: Path,
    kept: Path | None = None,
    calibration: str | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Run the plan of ``tools`` through Olive and read the graph back.

    Args:
        kept: folder whose finished steps the build goes on with, see ``kept_folder``.
        calibration: text that the plan's quantiser reads besides ours.

    Returns:
        Folder with the model below ``staging``, and what was found in its graph and ``predicted`` by its quantiser.

    Raises:
        ExportError: Olive failed, or the graph is not what the plan asked for.
    """
    from qwen_onnx.export.olive import collect
    from qwen_onnx.export.readback.common import read_back
    from qwen_onnx.export.workfolder import OWN_TEXT, PREDICTION
    from qwen_onnx.sources.checkpoint import read_json

    folder, work, plan = staging / "artifact", staging / "work", tools.plan
    if calibration is not None:
        work.mkdir()
        (work / OWN_TEXT).write_bytes(calibration.encode("utf-8"))
    collect(tools.run_olive(plan.olive, checkpoint.path, work, log, kept), folder)
    predicted = read_json(work / PREDICTION) if (work / PREDICTION).exists() else None
    # Olive's own copy of the model
    shutil.rmtree(work)
    return folder, read_back(folder, plan.readback) | ({"predicted": predicted} if predicted else {})


def _measured(
    tools: Toolchain, folder: Path, checkpoint: Checkpoint, staging: Path, options: VerifyOptions, kept: Path
) -> Report:
    """The report of a whole verification, with an fp32 export of the checkpoint below ``staging`` if it needs one.

    The golden file is written into ``kept``.
    """
    from qwen_onnx.verify import Keep

    reference = None
    if tools.plan.needs_reference:
        progress("exporting the fp32 reference")
        reference = tools.export_reference(checkpoint.path, staging)
    keep = Keep(kept, tools.plan.model, weights_digest(checkpoint.files))
    report = tools.verify(folder, checkpoint.path, reference, options, keep)
    # where the row came from is not the verification's business, but it belongs to the claim
    return report.model_copy(update={"claim": tools.plan.claim(report.verdict, report.verification)})


def verify_published(artifact: Artifact, checkpoint: Checkpoint, cache: Path, options: VerifyOptions) -> Report:
    """Verify an artifact again and publish it with the new report, golden file and verdict."""
    with build_lock(artifact.path, wait=True), staging_folder(artifact.path) as staging:
        tools = Toolchain.of(artifact.manifest.plan, cache)
        folder = staging / "artifact"
        shutil.copytree(artifact.path, folder, copy_function=os.link)
        for name in ("report.json", "report.html", "golden.npz", KV_SCALES, "manifest.json"):
            # a hard link: writing through it would alter the published file
            (folder / name).unlink(missing_ok=True)
        report = _measured(tools, artifact.path, checkpoint, staging, options, folder)
        report.save(folder)
        replace_verdict(artifact, folder, report.verdict, report.verification)
    return report


def _with_kept_log(error: ExportError, log: Path, job: Job) -> ExportError:
    """The staging folder goes away; its log is what the user needs next."""
    kept = job.cache / "logs" / f"{job.plan.name.replace('/', '-')}.log"
    if log.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(log, kept)
    return ExportError(error.what, where=str(kept), hint=error.hint)


def require_room(job: Job) -> None:
    """Refuse a build that cannot fit, before anything is downloaded.

    Raises:
        EnvironmentFault: too little disk or memory is free; names every shortage.
    """
    needs = estimate(job.plan, checkpoint_at_hand(job.plan, job.cache, job.source), verify=job.verify)
    environment = job.plan.environment
    to_install = environment.bytes if environment and not is_ready(environment, job.cache) else 0
    faults = [
        f"{need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free at {place}"
        for place, need in _disk_needs(job, needs, to_install).items()
        if (free := shutil.disk_usage(place).free) < need
    ]
    available = free_memory()
    memory = needs.least if job.verify else needs.memory
    if available < memory:
        faults.append(f"{memory / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free")
    if faults:
        raise EnvironmentFault(
            f"building {job.plan.model} needs about " + "; and ".join(faults),
            where=f"qwen-onnx plan {job.plan.asked} --target {job.plan.target} --estimate",
            hint="free space, or build elsewhere: qwen-onnx optimize ... --output FOLDER"
            + ("; --no-verify needs less of both" if job.verify else ""),
        )


def _disk_needs(job: Job, needs: Estimate, to_install: int) -> dict[Path, int]:
    """Bytes by folder: one when cache and target share a file system; an environment to be made is in the cache."""
    target, cache = (_existing(path) for path in (job.target.parent, job.cache))
    if target.stat().st_dev == cache.stat().st_dev:
        return {target: needs.disk + needs.download + to_install}
    # quantised files are linked on one disk and copied to another
    return {cache: needs.kept + needs.download + to_install, target: needs.disk}


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())
