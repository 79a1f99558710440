"""Where a verification keeps hidden states, so that one that was killed is gone on with."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from qwen_onnx.records import digest_of


@contextmanager
def scratch_folder(cache: Path | None, checkpoint: Path) -> Iterator[Path]:
    """A folder that is removed on the way out, but not by a kill; found again by the checkpoint's place.

    Args:
        cache: the folder is below ``verify/`` in it. None, and a second verification of the same checkpoint meanwhile,
            take a folder that nobody finds again.
    """
    folder = None if cache is None else cache / "verify" / digest_of(str(checkpoint.resolve()))[:16]
    lock = None if folder is None else _locked(folder)
    if folder is None or lock is None:
        with tempfile.TemporaryDirectory(prefix="qwen-onnx-verify-") as path:
            yield Path(path)
        return
    try:
        folder.mkdir(exist_ok=True)
        yield folder
        shutil.rmtree(folder)
    finally:
        lock.release()


def _locked(folder: Path) -> FileLock | None:
    """A lock beside ``folder``, or None when another process has it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock
