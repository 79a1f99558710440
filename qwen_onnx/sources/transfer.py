"""Bring files in, whatever the place: bounded by what was announced, resumed where they broke off, compared whole.

A transfer works in a folder of its own that no other user can enter. What an interrupted run left there is taken up
by the next one and compared like everything else before it counts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from qwen_onnx.artifact.store import noticing_full_disk
from qwen_onnx.errors import QwenOnnxError, full_disk
from qwen_onnx.files import sha256_of
from qwen_onnx.records import digest_of
from qwen_onnx.sources.remote import Faults, Interrupted, RemoteFile, Source, git_blob_of

Progress = Callable[[str], None]
# progress is told this often within a file
STEP = 64 << 20
# seconds before each further attempt; after this many that bring nothing the transfer ends
DELAYS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
# an attempt that brought so much is not one of them
HEADWAY = 1 << 20
# however much each brings
MOST_ATTEMPTS = 1000
# a place may ask to wait, but not for ever
LONGEST_WAIT = 120.0
AGAIN = "the same command goes on where this one stopped"


@dataclass
class Transfer:
    """Files on their way from ``source`` to ``staging/files``.

    Attributes:
        where: the source's address, for messages.
        staging: folder of this transfer; ``open`` makes it.
        moved: bytes that were transferred, ``present`` those that were here already.
    """

    source: Source
    where: str
    staging: Path
    faults: Faults
    progress: Progress
    moved: int = 0
    present: int = 0

    @property
    def files(self) -> Path:
        """The finished files."""
        return self.staging / "files"

    def open(self, total: int) -> None:
        """Make the folder, or take up the one that an interrupted run left.

        Args:
            total: bytes of all files together.

        Raises:
            faults.failed: somebody else can write into it, or it is a link.
            EnvironmentFault: the disk has no room for ``total``.
        """
        with noticing_full_disk(self.staging.parent):
            for folder in (self.staging, self.files, self.staging / "parts"):
                self._own_folder(folder)
                folder.chmod(0o700)
        here = sum(path.stat().st_size for path in self.staging.rglob("*") if path.is_file())
        if total - here > shutil.disk_usage(self.staging).free:
            raise full_disk(self.staging.parent)

    def fetch(self, file: RemoteFile, sha256: str | None = None) -> str:
        """Bring one file into ``files``, or find it there; only a file with the right digest gets its name.

        Args:
            file: its name and its digests were checked by ``require_safe``.
            sha256: what it must have; None goes by the file's own ``git_blob``, if it has one.

        Returns:
            Its SHA-256.

        Raises:
            faults.failed: the place fails, or a file is not one of those that were announced.
            faults.altered: its bytes are not those that were announced.
            EnvironmentFault: the disk is full.
        """
        final = self.files / file.name
        with noticing_full_disk(self.staging.parent):
            for folder in reversed(final.relative_to(self.files).parents[:-1]):
                self._own_folder(self.files / folder)
            if sha256 and final.is_file() and not final.is_symlink() and sha256_of(final) == sha256:
                self.present += file.size
                return sha256
            part = self.staging / "parts" / (sha256 or file.git_blob or digest_of(file.name))
            found = _brought(self, file, part, sha256)
            part.replace(final)
        return found

    def open_part(self, part: Path) -> BinaryIO:
        """Open what there is of a file, or begin it; never through a link."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            descriptor = os.open(part, flags, 0o666)
        except OSError as error:
            # the name is a link, a pipe without a reader, or a folder
            if part.is_symlink() or part.exists():
                raise self._foreign(part) from error
            raise
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or not _is_ours(found):
            os.close(descriptor)
            raise self._foreign(part)
        return os.fdopen(descriptor, "r+b")

    def _own_folder(self, folder: Path) -> None:
        """Make a folder; one that is there must be ours, and nobody else's to write into."""
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700 if folder == self.staging else 0o755)
        found = folder.lstat()
        shared = os.name == "posix" and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not stat.S_ISDIR(found.st_mode) or not _is_ours(found) or shared:
            raise self._foreign(folder)

    def _foreign(self, path: Path) -> QwenOnnxError:
        return self.faults.failed(
            "is not ours alone: a link, or somebody else can write there", where=str(path), hint=f"rm -r {self.staging}"
        )


def _is_ours(found: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or found.st_uid == os.geteuid()


def _brought(transfer: Transfer, file: RemoteFile, part: Path, sha256: str | None) -> str:
    """Bring a file, and once more from its beginning when what was patched together is not it; its SHA-256."""
    offset, comparable = 0, bool(sha256 or file.git_blob)
    if comparable:
        with transfer.open_part(part) as output:
            offset = os.fstat(output.fileno()).st_size
        offset = offset if offset <= file.size else 0
    patched = _persist(transfer, file, part, offset, comparable)
    found = _compare(file, part, sha256)
    if found is None and patched:
        transfer.progress(f"{file.name}: what was there does not fit: from the beginning")
        transfer.present -= offset
        _persist(transfer, file, part, 0, comparable)
        found = _compare(file, part, sha256)
    if found is None:
        part.unlink()
        raise transfer.faults.altered(
            f"{file.name} arrived with a digest other than the one announced",
            where=transfer.where,
            hint="try again; if it stays so, it was changed after it was published: do not use it",
        )
    return found


def _persist(transfer: Transfer, file: RemoteFile, part: Path, offset: int, comparable: bool) -> bool:
    """Append until the file is whole, through connections that break; whether it came in more than one piece.

    Args:
        comparable: there is a digest that finds out pieces that do not belong together; else each attempt begins anew.
    """
    transfer.present += offset
    patched, barren, reached = offset > 0, 0, offset
    for _ in range(MOST_ATTEMPTS):
        try:
            _append(transfer, file, part, offset)
            return patched
        except Interrupted as stop:
            if barren == len(DELAYS):
                raise stop.error from None
            last = stop
        length = part.stat().st_size
        offset = 0 if last.restart or not comparable else length
        barren = 0 if length - reached >= HEADWAY else barren + 1
        reached = max(reached, length)
        patched = patched or offset > 0
        wait = max(DELAYS[barren - 1] if barren else 0.0, min(last.after, LONGEST_WAIT))
        transfer.progress(f"{file.name}: {last.error.what}; again in {wait:.0f} s, from byte {offset:,}")
        time.sleep(wait)
    raise last.error


def _append(transfer: Transfer, file: RemoteFile, part: Path, offset: int) -> None:
    transfer.progress(f"{file.name} ({file.size / 1e6:,.1f} MB){f', from byte {offset:,}' if offset else ''}")
    place, tell = offset, teller(file.name, file.size, transfer.progress, offset)
    # nothing is asked for when all of it is here
    rest = transfer.source.read(file, offset) if offset < file.size else nullcontext(iter(()))
    with transfer.open_part(part) as output, rest as blocks:
        output.truncate(offset)
        output.seek(offset)
        for block in blocks:
            place += len(block)
            if place > file.size:
                raise transfer.faults.altered(
                    f"{file.name} is longer than the {file.size:,} bytes announced", where=transfer.where
                )
            output.write(block)
            transfer.moved += len(block)
            tell(len(block))
    if place != file.size:
        raise transfer.faults.failed(
            f"{file.name} ended after {place:,} of {file.size:,} bytes", where=transfer.where, hint=AGAIN
        )


def _compare(file: RemoteFile, part: Path, sha256: str | None) -> str | None:
    """SHA-256 of a part that is the file announced, else None."""
    found = sha256_of(part)
    if sha256:
        return found if found == sha256 else None
    if file.git_blob:
        return found if git_blob_of(part) == file.git_blob else None
    return found


def teller(name: str, size: int, progress: Progress, done: int = 0) -> Callable[[int], None]:
    """A counter of bytes that says every ``STEP`` how far a large file is."""

    def tell(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if size > STEP and before // STEP != done // STEP:
            progress(f"{name}: {done / 1e6:,.0f} of {size / 1e6:,.0f} MB")

    return tell
