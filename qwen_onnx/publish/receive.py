"""Take a package in: announced, bounded, compared, verified, and then in place by one rename.

What an interrupted run finished is kept in a hidden folder beside the target and compared again before it counts.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qwen_onnx.artifact.checksums import SUMS, read_sums
from qwen_onnx.artifact.manifest import build_lock, put_in_place
from qwen_onnx.errors import PackageError, PublishError, full_disk
from qwen_onnx.files import sha256_of
from qwen_onnx.package.records import PACKAGE, Package, PackageRecord, read_package
from qwen_onnx.package.verify import verify_package
from qwen_onnx.publish.bundle import require_pass
from qwen_onnx.records import digest_of

Progress = Callable[[str], None]
# of SHA256SUMS and package.json, which are read before anything else is believed
SMALL = 1 << 20
# Foundry's own rule for names, see docs of foundry-local-sdk, and the version
PACKAGE_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,199}:[0-9]{1,9}")
PART = re.compile(r"[A-Za-z0-9_+=@,()\[\] -][A-Za-z0-9._+=@,()\[\] -]{0,254}")
# progress is told this often within a file
STEP = 64 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file as a source announces it: ``size`` in bytes, ``sha256`` or ``git_blob`` (SHA-1) where it gives one.

    ``place`` is the source's own: a path, a URL or a digest.
    """

    name: str
    size: int
    sha256: str | None = None
    git_blob: str | None = None
    place: str = ""


class Source(Protocol):
    """Where a package comes from."""

    def listing(self) -> list[RemoteFile]:
        """All its files."""

    def read(self, file: RemoteFile, offset: int) -> AbstractContextManager[Iterator[bytes]]:
        """The bytes of ``file`` from ``offset`` on."""


@dataclass
class Received:
    """What came in: the package's digest, bytes that were transferred, and bytes that were here already."""

    package: Package
    digest: str
    moved: int = 0
    present: int = 0


@dataclass
class _Job:
    source: Source
    where: str
    staging: Path
    progress: Progress
    moved: int = 0
    present: int = 0

    @property
    def files(self) -> Path:
        return self.staging / "files"


@dataclass(frozen=True)
class _Announced:
    """What a source says it holds, once its list of checksums and its record were read."""

    listing: dict[str, RemoteFile]
    sums: dict[str, str]
    digest: str
    record: PackageRecord


def receive(
    source: Source, where: str, parent: Path, target: Path | None, expect: str | None, progress: Progress
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
        job = _Job(source, where, staging, progress)
        announced = _announced(job, expect)
        target = target or parent / announced.record.id.replace(":", "-")
        refuse_foreign(target)
        with build_lock(target, wait=True):
            if _is_there(target, announced.digest):
                job.moved, job.present = 0, sum(file.size for file in announced.listing.values())
            else:
                _complete(job, announced)
                put_in_place(job.files, target)
        shutil.rmtree(staging)
    return Received(Package(path=target, record=announced.record), announced.digest, job.moved, job.present)


def _is_there(target: Path, digest: str) -> bool:
    """Whether the very package is in place, each byte of it."""
    if not (target / SUMS).is_file() or sha256_of(target / SUMS) != digest:
        return False
    try:
        verify_package(target)
    except PackageError:
        return False
    return True


def refuse_foreign(target: Path) -> None:
    """PublishError when ``target`` is there and is not a package: it would be replaced whole."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise PublishError("is there and is not a folder", where=str(target), hint="choose another folder")
    if target.is_dir() and any(target.iterdir()) and not (target / PACKAGE).is_file():
        raise PublishError(
            "the folder holds something that is not a package; it would be lost",
            where=str(target),
            hint="choose a folder that is not there yet, or a package",
        )


def _announced(job: _Job, expect: str | None) -> _Announced:
    listing = {file.name: file for file in _safe(job.source.listing(), job.where)}
    for name in (SUMS, PACKAGE):
        if name not in listing:
            raise PublishError(f"no {name}: not a package of qwen-onnx", where=job.where)
        if listing[name].size > SMALL:
            raise PublishError(f"{name} is announced with {listing[name].size:,} bytes", where=job.where)
    _room(job, sum(file.size for file in listing.values()))
    _fetch(job, listing[SUMS], listing[SUMS].sha256)
    digest = sha256_of(job.files / SUMS)
    if expect and digest != expect:
        raise PublishError(
            f"its digest is {digest}, expected was {expect}", where=job.where, hint="ask who published it"
        )
    sums = _believed(read_sums(job.files), listing, job.where)
    _fetch(job, listing[PACKAGE], sums[PACKAGE])
    record = read_package(job.files).record
    if not PACKAGE_ID.fullmatch(record.id):
        raise PublishError(f"{record.id!r} is no id of a package", where=job.where)
    require_pass(record, job.where)
    return _Announced(listing, sums, digest, record)


def _complete(job: _Job, announced: _Announced) -> None:
    for name in sorted(announced.sums.keys() - {PACKAGE}):
        _fetch(job, announced.listing[name], announced.sums[name])
    # what an interrupted pull of another version left
    for path in job.files.rglob("*"):
        if path.is_file() and path.relative_to(job.files).as_posix() not in announced.listing:
            path.unlink()
    require_pass(verify_package(job.files).record, job.where)
    if sha256_of(job.files / SUMS) != announced.digest:
        raise PublishError(f"{SUMS} changed while it was verified", where=str(job.files))


def _safe(listing: list[RemoteFile], where: str) -> list[RemoteFile]:
    """Refuse names that lead out of a folder, or that two files share, on file systems without case too."""
    seen: set[str] = set()
    for file in listing:
        if not all(PART.fullmatch(part) and part == part.strip() for part in file.name.split("/")):
            raise PublishError(f"{file.name!r} cannot be the name of a file in a package", where=where)
        if file.name.lower() in seen:
            raise PublishError(f"{file.name!r} is there twice", where=where)
        if file.size < 0:
            raise PublishError(f"{file.name} is announced with {file.size} bytes", where=where)
        seen.add(file.name.lower())
    return listing


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


def _room(job: _Job, total: int) -> None:
    job.staging.mkdir(exist_ok=True)
    here = sum(path.stat().st_size for path in job.staging.rglob("*") if path.is_file())
    if total - here > shutil.disk_usage(job.staging).free:
        raise full_disk(job.staging.parent)


def _fetch(job: _Job, file: RemoteFile, sha256: str | None) -> None:
    """Bring one file into the staging folder, or find it there; only a file with the right digest gets its name."""
    final = job.staging / "files" / file.name
    if sha256 and final.is_file() and not final.is_symlink() and sha256_of(final) == sha256:
        job.present += file.size
        return
    part = job.staging / "parts" / (sha256 or file.git_blob or digest_of(file.name))
    part.parent.mkdir(exist_ok=True)
    offset = part.stat().st_size if part.exists() and sha256 and part.stat().st_size <= file.size else 0
    job.present += offset
    _append(job, file, part, offset)
    _compare(job, file, part, sha256)
    final.parent.mkdir(parents=True, exist_ok=True)
    part.replace(final)


def _append(job: _Job, file: RemoteFile, part: Path, offset: int) -> None:
    job.progress(f"{file.name} ({file.size / 1e6:,.1f} MB){f', from byte {offset:,}' if offset else ''}")
    place, tell = offset, teller(file.name, file.size, job.progress, offset)
    # nothing is asked for when all of it is here
    rest = job.source.read(file, offset) if offset < file.size else nullcontext(iter(()))
    with part.open("ab") as output, rest as blocks:
        output.truncate(offset)
        for block in blocks:
            place += len(block)
            if place > file.size:
                raise PublishError(f"{file.name} is longer than the {file.size:,} bytes announced", where=job.where)
            output.write(block)
            job.moved += len(block)
            tell(len(block))
    if place != file.size:
        raise PublishError(
            f"{file.name} ended after {place:,} of {file.size:,} bytes",
            where=job.where,
            hint="the same command goes on where this one stopped",
        )


def teller(name: str, size: int, progress: Progress, done: int = 0) -> Callable[[int], None]:
    """A counter of bytes that says every ``STEP`` how far a large file is."""

    def tell(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if size > STEP and before // STEP != done // STEP:
            progress(f"{name}: {done / 1e6:,.0f} of {size / 1e6:,.0f} MB")

    return tell


def _compare(job: _Job, file: RemoteFile, part: Path, sha256: str | None) -> None:
    found: str | None = sha256_of(part)
    expected = sha256
    if not sha256 and file.git_blob:
        content = part.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        found, expected = blob.hexdigest(), file.git_blob
    if expected and found != expected:
        part.unlink()
        raise PublishError(
            f"{file.name} arrived with another digest than announced",
            where=job.where,
            hint="try again; if it stays so, it was changed after it was published: do not use it",
        )
