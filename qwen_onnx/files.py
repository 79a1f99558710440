"""Checksums, sizes and replacement of files, the same way everywhere."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# the folder of this package, in a checkout or where it was installed
PACKAGE = Path(__file__).resolve().parent
# our own list of checksums beside a checkpoint
CHECKSUMS = "checksums.json"
# the record of a finished step of a build, see export/workfolder.py
RECORD_SUFFIX = ".record.json"
# what of a checkpoint is its licence
LICENCE_FILES = ("LICENSE*", "NOTICE*")
# the one whose text is at hand wherever this project is
APACHE = "Apache-2.0"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_checksums(folder: Path, *, without: str) -> dict[str, str]:
    """SHA-256 by name of every file below ``folder``, sorted; hidden files and ``without`` are left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    kept = [name for name in names if name != without and not any(part.startswith(".") for part in name.split("/"))]
    return {name: sha256_of(folder / name) for name in kept}


def folder_bytes(folder: Path) -> int:
    """Sum of the sizes of all files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_private(path: Path, text: str) -> None:
    """``write_whole`` for what only its owner may read."""
    write_whole(path, text, 0o600)


def write_whole(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace a file by one rename. OSError leaves the old one and nothing else."""
    with whole_file(path, mode) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def whole_file(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when it is written; an exception leaves the old one and nothing else."""
    # mkstemp makes it with mode 0600
    descriptor, staging = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.chmod(staging, mode)
        os.replace(staging, path)
    finally:
        Path(staging).unlink(missing_ok=True)


def licence_files(folder: Path) -> list[Path]:
    """The licence and notices of a checkpoint, which travel with everything that is made of it."""
    return sorted(path for pattern in LICENCE_FILES for path in folder.glob(pattern) if path.is_file())
