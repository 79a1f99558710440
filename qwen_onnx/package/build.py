"""Artifact → package: copy, describe for Foundry Local, document, check, rename."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qwen_onnx.artifact import MANIFEST, Artifact, build_lock, put_in_place, staging_folder
from qwen_onnx.errors import PackageError
from qwen_onnx.package.checksums import write_sums
from qwen_onnx.package.documents import write_documents
from qwen_onnx.package.foundry import package_name, write_foundry
from qwen_onnx.package.records import LEFT_BEHIND, PACKAGE, Package, PackageRecord, Profile
from qwen_onnx.package.verify import verify_package

Progress = Callable[[str], None]


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


def build_package(job: PackageJob, progress: Progress = print) -> Package:
    """Make the package and publish it by one rename.

    Raises:
        PackageError: the verdict is not PASS, or a rule is broken; nothing was published.
    """
    manifest = job.artifact.manifest
    if manifest.verdict != "PASS" and not job.allow_unverified:
        raise PackageError(
            f"the verdict is {manifest.verdict}, only PASS is packaged",
            where=str(job.artifact.path),
            hint=f"qwen-onnx verify {job.artifact.path}; --allow-unverified packages it and says so inside",
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
        unverified=manifest.verdict != "PASS",
    )
    progress(f"packaging {record.id} for {job.profile}")
    with build_lock(target, wait=True), staging_folder(target) as staging:
        folder = staging / "package"
        folder.mkdir()
        for file in (*manifest.files, MANIFEST):
            if file not in LEFT_BEHIND:
                shutil.copyfile(job.artifact.path / file, folder / file)
        write_foundry(folder, record)
        record = write_documents(folder, record, manifest)
        (folder / PACKAGE).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
        write_sums(folder)
        verify_package(folder)
        put_in_place(folder, target)
    return Package(path=target, record=record)
