"""Artifact → package: copy, describe for Foundry Local, document, check, rename."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from qwen_onnx.artifact.checksums import write_sums
from qwen_onnx.artifact.manifest import MANIFEST, Artifact, Manifest, read_manifest
from qwen_onnx.artifact.store import build_lock, put_in_place, staging_folder
from qwen_onnx.errors import PackageError
from qwen_onnx.package.devices import package_name
from qwen_onnx.package.devices_proven import copy_device_records
from qwen_onnx.package.documents import write_documents
from qwen_onnx.package.foundry import write_foundry
from qwen_onnx.package.records import LEFT_BEHIND, PACKAGE, Package, PackageRecord, Profile, read_package
from qwen_onnx.package.rules import check_rules
from qwen_onnx.package.verify import verify_package
from qwen_onnx.processes.progress import progress
from qwen_onnx.records import Verdict


@dataclass(frozen=True)
class PackageJob:
    """What to package and how.

    Attributes:
        folder: where the package's own folder is put.
        name: base of Foundry's id; default: the model and its precision.
        allow_unverified: package an artifact whose verdict is not PASS, and say so in the package.
    """

    artifact: Artifact
    folder: Path
    profile: Profile = "sdk2"
    name: str | None = None
    version: int = 1
    allow_unverified: bool = False


def build_package(job: PackageJob) -> Package:
    """Make the package and publish it by one rename.

    Raises:
        PackageError: the verdict is not PASS, Foundry Local cannot run it, or a rule is broken; nothing was published.
    """
    manifest = job.artifact.manifest
    if manifest.verdict is not Verdict.PASS and not job.allow_unverified:
        raise PackageError(
            f"the verdict is {manifest.verdict}, only PASS is packaged",
            where=str(job.artifact.path),
            hint=f"qwen-onnx verify {job.artifact.path}; --allow-unverified packages it and says so inside",
        )
    about = manifest.about
    if about is None:
        raise PackageError(
            "the artifact's manifest does not say what its model is for: an older version built it",
            where=str(job.artifact.path),
            hint=f"qwen-onnx optimize {manifest.plan.asked} --target {manifest.plan.target} --force",
        )
    if manifest.plan.hears:
        raise PackageError(
            "onnxruntime-genai has no type of model that hears and does not see, so Foundry Local cannot load it",
            where=str(job.artifact.path),
            hint=f"qwen-onnx serve {job.artifact.path}",
        )
    if manifest.plan.sees and job.profile == "cli1":
        raise PackageError(
            "Foundry Local before 2.1 was not tried with a model that sees",
            where=str(job.artifact.path),
            hint="--profile sdk2",
        )
    name = package_name(manifest.plan, job.name)
    target = job.folder / f"{name}-{job.version}"
    record = PackageRecord(
        id=f"{name}:{job.version}",
        profile=job.profile,
        model=manifest.plan.model,
        target=manifest.plan.target,
        precision=manifest.plan.precision,
        artifact_key=manifest.key,
        plan_digest=manifest.plan_digest,
        verdict=manifest.verdict,
        claim=manifest.claim,
        unverified=manifest.verdict is not Verdict.PASS,
        kind=about.kind,
        tasks=about.tasks,
    )
    progress(f"packaging {record.id} for {job.profile}")
    with build_lock(target, wait=True), staging_folder(target) as staging:
        _check_replaced(target, record, manifest)
        # by its own name: a rule compares it with the id
        folder = staging / target.name
        folder.mkdir()
        for file in (*manifest.files, MANIFEST):
            if file not in LEFT_BEHIND:
                shutil.copyfile(job.artifact.path / file, folder / file)
        copy_device_records(job.artifact.path, folder)
        write_foundry(folder, record)
        record = write_documents(folder, record, manifest)
        (folder / PACKAGE).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
        write_sums(folder)
        check_rules(folder)
        verify_package(folder)
        put_in_place(folder, target)
    return Package(path=target, record=record)


def _check_replaced(target: Path, record: PackageRecord, manifest: Manifest) -> None:
    """Two profiles share the id, two targets may by --name, two models of one name do; a folder may be anyone's."""
    if not target.exists():
        return
    try:
        there = read_package(target).record
    except PackageError as error:
        raise PackageError(error.what, where=error.where, hint=f"it is in the way: remove {target}") from error
    if (there.target, there.profile) != (record.target, record.profile):
        raise PackageError(
            f"the package of {there.target} for {there.profile} has the id {record.id}",
            where=str(target),
            hint="--name, or another --output",
        )
    before = read_manifest(target)
    if (before.source.revision, before.plan.adapter) != (manifest.source.revision, manifest.plan.adapter):
        raise PackageError(
            f"the package {record.id} is there, made of other weights: {before.source.origin}",
            where=str(target),
            hint=f"--version, --name or another --output keeps both; to replace it, remove {target}",
        )
