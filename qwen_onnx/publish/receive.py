"""Take a package in: announced, bounded, compared, verified, and then in place by one rename.

What an interrupted run finished is kept in a hidden folder beside the target and compared again before it counts.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qwen_onnx.artifact.checksums import SUMS, read_sums
from qwen_onnx.artifact.store import build_lock, put_in_place
from qwen_onnx.errors import PackageError, PublishError
from qwen_onnx.files import sha256_of
from qwen_onnx.package.adapters import AdapterPackage, AdapterPackageRecord, read_any, verify_any
from qwen_onnx.package.records import PACKAGE, Package, PackageRecord
from qwen_onnx.publish.bundle import require_pass
from qwen_onnx.publish.faults import FAULTS
from qwen_onnx.records import digest_of
from qwen_onnx.sources.remote import RemoteFile, Source, require_safe
from qwen_onnx.sources.transfer import Progress, Transfer

# of SHA256SUMS and package.json, which are read before anything else is believed
SMALL = 1 << 20
# Foundry's own rule for names, see docs of foundry-local-sdk, and the version
PACKAGE_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,199}:[0-9]{1,9}")


class PackageSource(Source, Protocol):
    """Where a package comes from."""

    def listing(self) -> list[RemoteFile]:
        """All its files."""


@dataclass
class Received:
    """What came in: the package's digest, bytes that were transferred, and bytes that were here already."""

    package: Package | AdapterPackage
    digest: str
    moved: int = 0
    present: int = 0


@dataclass(frozen=True)
class _Announced:
    """What a source says it holds, once its list of checksums and its record were read."""

    listing: dict[str, RemoteFile]
    sums: dict[str, str]
    digest: str
    record: PackageRecord | AdapterPackageRecord


def receive(
    source: PackageSource, where: str, parent: Path, target: Path | None, expect: str | None, progress: Progress
) -> Received:
    """Take a package in and put it in place.

    Args:
        where: the source's address, for messages.
        parent: folder in which the package is put, under its own name, unless ``target`` is given.
        expect: SHA-256 that ``SHA256SUMS`` must have.

    Raises:
        PublishError: the source fails, or gives what cannot be trusted; the old package, if any, stays.
        PackageError: what came breaks a rule of packages.
    """
    if target:
        refuse_foreign(target)
    parent.mkdir(parents=True, exist_ok=True)
    staging = parent / f".{target.name if target else digest_of(where)[:16]}.pull"
    with build_lock(staging, wait=True):
        job = Transfer(source, where, staging, FAULTS, progress)
        announced = _announced(job, source, expect)
        target = target or parent / announced.record.id.replace(":", "-")
        refuse_foreign(target)
        with build_lock(target, wait=True):
            if _is_there(target, announced.digest):
                job.moved, job.present = 0, sum(file.size for file in announced.listing.values())
            else:
                _complete(job, announced)
                put_in_place(job.files, target)
        shutil.rmtree(staging)
    return Received(read_any(target), announced.digest, job.moved, job.present)


def _is_there(target: Path, digest: str) -> bool:
    """Whether the very package is in place, each byte of it."""
    if not (target / SUMS).is_file() or sha256_of(target / SUMS) != digest:
        return False
    try:
        verify_any(target)
    except PackageError:
        return False
    return True


def refuse_foreign(target: Path) -> None:
    """PublishError when ``target`` is there and is not a package: it would be replaced whole."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise PublishError("exists and is not a folder", where=str(target), hint="choose another folder")
    if target.is_dir() and any(target.iterdir()) and not (target / PACKAGE).is_file():
        raise PublishError(
            "the folder holds something that is not a package; it would be lost",
            where=str(target),
            hint="choose a folder that is not there yet, or a package",
        )


def _announced(job: Transfer, source: PackageSource, expect: str | None) -> _Announced:
    listing = {file.name: file for file in require_safe(source.listing(), job.where, FAULTS)}
    for name in (SUMS, PACKAGE):
        if name not in listing:
            raise PublishError(f"no {name}: not a package of qwen-onnx", where=job.where)
        if listing[name].size > SMALL:
            raise PublishError(f"{name} is announced with {listing[name].size:,} bytes", where=job.where)
    job.open(sum(file.size for file in listing.values()))
    digest = job.fetch(listing[SUMS], listing[SUMS].sha256)
    if expect and digest != expect:
        raise PublishError(
            f"its digest is {digest}, not the expected {expect}", where=job.where, hint="ask who published it"
        )
    sums = _believed(read_sums(job.files), listing, job.where)
    job.fetch(listing[PACKAGE], sums[PACKAGE])
    record = read_any(job.files).record
    if not PACKAGE_ID.fullmatch(record.id):
        raise PublishError(f"{record.id!r} is not the id of a package", where=job.where)
    require_pass(record, job.where)
    return _Announced(listing, sums, digest, record)


def _complete(job: Transfer, announced: _Announced) -> None:
    for name in sorted(announced.sums.keys() - {PACKAGE}):
        job.fetch(announced.listing[name], announced.sums[name])
    # what an interrupted pull of another version left
    for path in job.files.rglob("*"):
        if path.is_file() and path.relative_to(job.files).as_posix() not in announced.listing:
            path.unlink()
    require_pass(verify_any(job.files).record, job.where)
    if sha256_of(job.files / SUMS) != announced.digest:
        raise PublishError(f"{SUMS} changed while it was verified", where=str(job.files))


def _believed(sums: dict[str, str], listing: dict[str, RemoteFile], where: str) -> dict[str, str]:
    """``SHA256SUMS``, once it and what the source announces name the same files with the same digests."""
    announced = listing.keys() - {SUMS}
    faults = [f"{name} is announced and not in {SUMS}" for name in sorted(announced - sums.keys())]
    faults += [f"{name} is in {SUMS} and not announced" for name in sorted(sums.keys() - announced)]
    faults += [
        f"{name} is announced with another SHA-256 than in {SUMS}"
        for name in sorted(announced & sums.keys())
        if listing[name].sha256 not in (None, sums[name])
    ]
    if faults:
        raise PublishError("; ".join(faults), where=where, hint="it was changed after it was published: do not use it")
    return sums
