"""Where artifacts appear: one builder at a time, in a hidden folder beside the target, put in place by one rename."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qwen_onnx.errors import ArtifactError, BuildLockedError, full_disk
from qwen_onnx.files import RECORD_SUFFIX
from qwen_onnx.records import digest_of

AT_FDCWD, RENAME_EXCHANGE = -100, 2
REJECTED = ".rejected"


def rejected_place(target: Path) -> Path:
    """Where that which did not pass appears, beside the last good one at ``target``."""
    return target.with_name(target.name + REJECTED)


@contextmanager
def build_lock(target: Path, *, wait: bool, waiting: Any = None) -> Iterator[None]:
    """Only one process builds ``target``. The kernel frees the lock when its holder dies.

    Args:
        wait: wait for the other build instead of failing.
        waiting: called once, without arguments, when there is something to wait for.

    Raises:
        BuildLockedError: another process holds it and ``wait`` is false.
        ArtifactError: the folder that it goes into cannot be made.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"the folder cannot be made: {error.strerror}", where=str(target.parent), hint="give another --output"
        ) from error
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        if not wait:
            raise BuildLockedError(
                "another process is building this artifact", where=str(target), hint="wait for it, or drop --no-wait"
            ) from error
        if waiting:
            waiting()
        lock.acquire()
    try:
        _recover(target)
        yield
    finally:
        lock.release()


def _recover(target: Path) -> None:
    """Under the lock: what a killed build left behind goes; an old artifact set aside comes back."""
    aside = _aside(target)
    if aside.exists() and not target.exists():
        os.rename(aside, target)
    for leftover in target.parent.glob(f".{target.name}.staging-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A fresh folder beside ``target``; removed on the way out, so a failure leaves nothing behind.

    Raises:
        EnvironmentFault: the disk is full.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.staging-", dir=target.parent))
    try:
        with noticing_full_disk(target.parent):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def kept_folder(cache: Path, key: str, target: Path) -> Iterator[Path]:
    """A folder for finished steps of the build with ``key``, which a killed or failed build leaves for the next.

    It is found by the key and by ``target``, so that no other build, with another plan, other weights or other
    packages, ever reads it. On success it is removed. What a build of the same target under another key left
    behind is removed at once: nobody can go on with it. Call it under ``build_lock(target)``.

    Args:
        cache: root of the downloads; the folder is made below ``work/`` in it.
    """
    place = digest_of(str(target.resolve()))[:12]
    folder = cache / "work" / f"{place}-{key[:24]}"
    for stale in folder.parent.glob(f"{place}-*"):
        if stale != folder:
            shutil.rmtree(stale)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except Exception:
        # nothing finished, nothing to go on with
        if not any(folder.rglob(f"*{RECORD_SUFFIX}")):
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


@contextmanager
def noticing_full_disk(folder: Path) -> Iterator[None]:
    """Turn the system's word for a disk without room into an EnvironmentFault that names ``folder``."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise full_disk(folder) from error


def put_in_place(staged: Path, target: Path) -> None:
    """Flush everything to disk and rename ``staged`` to ``target``, under ``build_lock(target)``.

    A folder already there is exchanged in the same system call where the kernel can; elsewhere it is
    set aside first, and ``build_lock`` restores it if we die in between.
    """
    for path in sorted(staged.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    os.chmod(staged, 0o755)
    if not target.exists():
        os.rename(staged, target)
    elif not _exchange(staged, target):
        os.rename(target, _aside(target))
        os.rename(staged, target)
        shutil.rmtree(_aside(target))


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders atomically: Linux renameat2(2) with RENAME_EXCHANGE; false where it is not known."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    done: int = renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return done == 0
