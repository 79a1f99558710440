"""What a place announces of its files, whatever the place, and what is believed of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qwen_onnx.errors import ChecksumError, QwenOnnxError, SourceError

PART = re.compile(r"[A-Za-z0-9_+=@,()\[\] -][A-Za-z0-9._+=@,()\[\] -]{0,254}")
SHA256, SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
# the largest repositories of Qwen hold some 250
MOST_FILES = 10_000
LONGEST_NAME = 1024
BLOCK = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file as a place announces it: ``size`` in bytes, ``sha256`` or ``git_blob`` (SHA-1) where it gives one.

    ``place`` is the source's own: a path, a URL or a digest.
    """

    name: str
    size: int
    sha256: str | None = None
    git_blob: str | None = None
    place: str = ""


class Source(Protocol):
    """Where files come from."""

    def read(self, file: RemoteFile, offset: int) -> AbstractContextManager[Iterator[bytes]]:
        """The bytes of ``file`` from ``offset`` on; raises ``Interrupted`` when it is worth trying again."""


@dataclass(frozen=True)
class Faults:
    """The errors of a transfer: ``failed`` when a place fails or lies, ``altered`` for other bytes than announced."""

    failed: type[QwenOnnxError]
    altered: type[QwenOnnxError]


CHECKPOINT_FAULTS = Faults(SourceError, ChecksumError)


class Interrupted(Exception):
    """A read broke off, and another attempt may succeed; never leaves a transfer.

    Args:
        error: what to raise when there is no further attempt.
        restart: what came so far makes no sense.
        after: seconds that the place asks to wait.
    """

    def __init__(self, error: QwenOnnxError, *, restart: bool = False, after: float = 0.0) -> None:
        super().__init__(str(error))
        self.error, self.restart, self.after = error, restart, after


def require_safe(listing: list[RemoteFile], where: str, faults: Faults, *, bare: bool = False) -> list[RemoteFile]:
    """Refuse what could lead out of a folder: names, and digests, which name the parts of a transfer.

    Two names that differ in case alone are refused, too: on some file systems they are one.

    Args:
        bare: folders within names are refused.

    Raises:
        faults.failed: names the file.
    """
    if len(listing) > MOST_FILES:
        raise faults.failed(f"{len(listing):,} files are announced, more than {MOST_FILES:,}", where=where)
    seen: set[str] = set()
    for file in listing:
        parts = file.name.split("/")
        plain = len(file.name) <= LONGEST_NAME and all(PART.fullmatch(part) and part == part.strip() for part in parts)
        if not plain or (bare and len(parts) > 1):
            raise faults.failed(f"{file.name[:LONGEST_NAME]!r} cannot be the name of a file here", where=where)
        if file.name.lower() in seen:
            raise faults.failed(f"{file.name!r} is there twice", where=where)
        if file.size < 0:
            raise faults.failed(f"{file.name} is announced with {file.size} bytes", where=where)
        for digest, form in ((file.sha256, SHA256), (file.git_blob, SHA1)):
            if digest is not None and not form.fullmatch(digest):
                raise faults.failed(f"{file.name} is announced with a digest that is none", where=where)
        seen.add(file.name.lower())
    return listing


def git_blob_of(path: Path) -> str:
    """SHA-1 of a file as git names its blob."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
