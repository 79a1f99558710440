"""Checksums and sizes of files, the same way everywhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

# our own list of checksums beside a checkpoint
CHECKSUMS = "checksums.json"


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
