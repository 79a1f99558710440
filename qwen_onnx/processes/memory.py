"""Memory of this process, and how much more it may take: what is free, within the limit of its control group.

A container's limit is no part of the machine's figures, and a process that goes over it is killed without a word.
https://docs.kernel.org/admin-guide/cgroup-v2.html#memory, and cgroup-v1/memory.html beside it.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

import psutil

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# as version 1 writes "none"; anything near it is one, too
UNLIMITED = 1 << 60


@dataclass(frozen=True)
class _Files:
    """What a version of control groups calls its files, and its figures of pages that belong to files."""

    root: str
    limit: str
    used: str
    pages: tuple[str, ...]


VERSION_1 = _Files(
    "memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
VERSION_2 = _Files("", "memory.max", "memory.current", ("inactive_file", "active_file"))


def free_memory() -> int:
    """Bytes that this process may still take: the machine's, or what its control groups leave if that is less.

    Pages of files count as free, as they do in the machine's own figure: they can be dropped and read again.
    """
    return min(int(psutil.virtual_memory().available), *(max(limit - used, 0) for limit, used in _groups()))


def total_memory() -> int:
    """Bytes that this process could have: the machine's, or the least limit of its control groups."""
    return min(int(psutil.virtual_memory().total), *(limit for limit, _ in _groups()))


def return_free_memory() -> None:
    """Give freed memory back to the kernel: glibc keeps it, and blocks of other sizes leave ever more of it behind."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _groups() -> list[tuple[int, int]]:
    """Limit and use, pages of files apart, of every control group above this process; one without bounds at least."""
    found = [(UNLIMITED, 0)]
    try:
        lines = OWN.read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files = VERSION_1 if controllers else VERSION_2
        place = GROUPS / files.root
        # in a container the path may be the host's, of which the container sees the end alone: its root
        folders = [place, *(place.joinpath(*parts) for parts in _beginnings(path))]
        found += [known for folder in folders if (known := _group(folder, files))]
    return found


def _beginnings(path: str) -> list[tuple[str, ...]]:
    parts = tuple(part for part in path.split("/") if part)
    return [parts[: count + 1] for count in range(len(parts))]


def _group(folder: Path, files: _Files) -> tuple[int, int] | None:
    """Limit and use of one group; None where there is no limit, or no such group."""
    try:
        limit, used = (folder / files.limit).read_text().strip(), int((folder / files.used).read_text())
        told = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max" or int(limit) >= UNLIMITED:
        return None
    return int(limit), used - sum(int(told.get(name, 0)) for name in files.pages)
