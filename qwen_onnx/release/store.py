"""Finished jobs on disk: what a later run with the same key takes as it is, and what a killed release goes on with.

``<cache>/release/<digest of the release's path>/<job>/`` holds ``result.json``, ``job.log`` and
``packages/<profile>/<package>/``. It appears by one rename when the job has ended.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from qwen_onnx.artifact.checksums import check_sums, package_digest
from qwen_onnx.artifact.code import code_digest
from qwen_onnx.artifact.manifest import build_key, package_versions
from qwen_onnx.artifact.store import put_in_place
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.errors import PackageError
from qwen_onnx.export.code import modules_of
from qwen_onnx.records import digest_of
from qwen_onnx.release.matrix import ReleaseJob
from qwen_onnx.release.records import JobResult
from qwen_onnx.sources.fetch import expected_revisions

RESULT, LOG, PACKAGES = "result.json", "job.log", "packages"
UNFINISHED = ".unfinished-"
# a job, and what the verbs do that it runs
JOB = (
    "qwen_onnx.release.job",
    "qwen_onnx.build.optimize",
    "qwen_onnx.package.build",
    "qwen_onnx.package.verify",
    "qwen_onnx.package.foundry_check",
)


def code_key(plan: Plan, source: Path | None) -> str:
    """The key of a build, but for its weights, over the code of the whole job; equal wherever a job may run."""
    code = code_digest((*JOB, *modules_of(plan, source)))
    return build_key(plan, "", package_versions(), code)


def job_key(job: ReleaseJob, plan: Plan, cache: Path, source: Path | None, code: str) -> str:
    """Digest of everything that decides what becomes of a job; ``code`` is that of ``code_key``."""
    return digest_of([job.model_dump(mode="json"), sorted(expected_revisions(plan, cache, source)), code])


@dataclass(frozen=True)
class Store:
    """The finished jobs of one release; used under the release's lock."""

    root: Path

    @classmethod
    def of(cls, output: Path, cache: Path) -> Store:
        """The store of the release at ``output``; what a killed run left unfinished is removed."""
        store = cls(cache / "release" / digest_of(str(output))[:12])
        store.root.mkdir(parents=True, exist_ok=True)
        store.sweep()
        return store

    def sweep(self) -> None:
        """Remove the folders of attempts that nobody works in any longer."""
        for leftover in self.root.glob(f"{UNFINISHED}*"):
            shutil.rmtree(leftover)

    def folder(self, job: ReleaseJob) -> Path:
        """Where the finished job is, or will be."""
        return self.root / job.slug

    def unfinished_name(self, job: ReleaseJob, attempt: str) -> str:
        """Name of the folder of one attempt at a job, below the root."""
        return f"{UNFINISHED}{job.slug}-{attempt}"

    def unfinished(self, job: ReleaseJob, attempt: str) -> Path:
        """That folder, fresh."""
        folder = self.root / self.unfinished_name(job, attempt)
        folder.mkdir()
        return folder

    def finish(self, job: ReleaseJob, folder: Path, result: JobResult) -> None:
        """Put an attempt's folder in the job's place; an older result of the job is gone then."""
        (folder / RESULT).write_text(result.model_dump_json(indent=1), encoding="utf-8")
        place = self.folder(job)
        put_in_place(folder, place)
        # exchanged: what was there before is there now
        shutil.rmtree(folder, ignore_errors=True)

    def found(self, job: ReleaseJob, key: str) -> JobResult | None:
        """The result of a job that passed under ``key`` and whose packages are whole, else None: run it."""
        folder = self.folder(job)
        try:
            result = JobResult.model_validate_json((folder / RESULT).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        if not result.passed or result.key != key:
            return None
        return result.model_copy(update={"cached": True}) if whole(folder, result) else None


def whole(folder: Path, result: JobResult) -> bool:
    """Whether every package of ``result`` is in ``folder``, byte for byte."""
    try:
        for package in result.packages:
            check_sums(folder / package.folder)
    except PackageError:
        return False
    return all(package_digest(folder / package.folder) == package.digest for package in result.packages)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows one, else a copy; nobody writes into either."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
