"""An artifact is a value: a folder, whole or absent, that says what it is and how it was made.

``manifest.json`` lists every file with its SHA-256, the plan, the source and the versions that shaped it.
Builders write into a hidden folder beside the target; ``publish`` swaps it in by one rename.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from qwen_onnx import __version__
from qwen_onnx.artifact.checksums import SUMS, check_sums, differences, sums_of
from qwen_onnx.artifact.genai_config import GENAI_CONFIG, GenaiConfig
from qwen_onnx.artifact.names import name_faults
from qwen_onnx.bounded import read_description
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.errors import ArtifactError, BuildLockedError, EnvironmentFault, PackageError, full_disk
from qwen_onnx.files import RECORD_SUFFIX
from qwen_onnx.git import Checkout
from qwen_onnx.records import Record, digest_of

MANIFEST = "manifest.json"
MOST_BYTES = 4 << 20
HINT = "build it: make optimize TARGET=cpu"
# what these packages do ends up in the bytes of the graph or of the tokenizer
SHAPING_PACKAGES = [
    "olive-ai",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-genai",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "numpy",
]
AT_FDCWD, RENAME_EXCHANGE = -100, 2


class SourceRecord(Record):
    """Where the weights came from; ``files`` are SHA-256 by name."""

    origin: str
    revision: str
    files: dict[str, str]


class Manifest(Record):
    """Everything about an artifact but its bytes.

    Attributes:
        key: digest of plan, source revision and package versions; equal keys mean equal artifacts.
        plan: complete plan and ``plan_digest`` its digest.
        packages: versions of what shaped the bytes.
        files: SHA-256 by relative name, the manifest itself apart.
        size_bytes: sum over all files.
        readback: options that were found in the finished graph.
        checkout: of our own code, at the time of the build; None: it was installed, or not yet recorded.
        verdict: of the verification; UNVERIFIED when it was not asked for.
        claim: what that verdict proves at the target's verification level.
    """

    schema_version: Literal[1] = 1
    key: str
    plan: Plan
    plan_digest: str
    source: SourceRecord
    packages: dict[str, str]
    python: str
    checkout: Checkout | None = None
    files: dict[str, str]
    size_bytes: int
    readback: dict[str, Any]
    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE", "UNVERIFIED"]
    claim: str
    built_seconds: float


class Artifact(Record):
    """A folder whose files match its manifest."""

    path: Path
    manifest: Manifest


def package_versions() -> dict[str, str]:
    """Installed versions of the shaping packages and of qwen-onnx itself.

    Raises:
        EnvironmentFault: the export extra is not installed.
    """
    versions = {"qwen-onnx": __version__}
    missing = []
    for name in SHAPING_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise EnvironmentFault(f"not installed: {', '.join(missing)}", hint="pip install 'qwen-onnx[export]'")
    return versions


def build_key(plan: Plan, source_revision: str, packages: dict[str, str], exporter: str) -> str:
    """The cache key. ``exporter`` is the digest of our own code that carries out the plan."""
    # calibration reads sources of Python's own library
    machine = [platform.machine(), platform.python_version()]
    return digest_of([plan.digest, source_revision, packages, machine, exporter])


def read_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json``; ArtifactError when it is missing or not ours."""
    return read_description(
        folder, MANIFEST, Manifest, called="an artifact", most_bytes=MOST_BYTES, error=ArtifactError, hint=HINT
    )


def open_artifact(folder: Path) -> Artifact:
    """Read the manifest and compare the SHA-256 of every file.

    Raises:
        ArtifactError: a file is missing, altered, or was added.
    """
    manifest = read_manifest(folder)
    found = _files(folder)
    if faults := [*differences(manifest.files, found), *name_faults(found)]:
        raise ArtifactError("; ".join(faults), where=str(folder), hint="build it again: make optimize TARGET=cpu")
    return Artifact(path=folder, manifest=manifest)


def open_runnable(folder: Path) -> Artifact:
    """An artifact, or a package of one, which ``SHA256SUMS`` tells apart: what serves an artifact serves a package.

    A package holds more files than the artifact's manifest lists, so its bytes are compared with its own list.

    Raises:
        ArtifactError: a file is missing, altered, or was added, has a name that no model needs, or
            ``genai_config.json`` says more than it may.
    """
    if not os.path.lexists(folder / SUMS):
        opened = open_artifact(folder)
        check_configuration(folder, opened.manifest.files)
        return opened
    hint = "package or pull it again"
    try:
        listed = check_sums(folder)
    except PackageError as error:
        raise ArtifactError(error.what, where=error.where, hint=hint) from error
    if faults := name_faults(listed):
        raise ArtifactError("; ".join(faults), where=str(folder), hint=hint)
    check_configuration(folder, listed)
    return Artifact(path=folder, manifest=read_manifest(folder))


def check_configuration(folder: Path, files: Collection[str]) -> GenaiConfig:
    """What ``genai_config.json`` says, once it says nothing but what it may, and names one of ``files``.

    Raises:
        ArtifactError: it does not.
    """
    config = GenaiConfig.read(folder)
    if config.graph_file not in files:
        raise ArtifactError(
            f"{GENAI_CONFIG} names {config.graph_file}, which is not a file of it", where=str(folder), hint=HINT
        )
    return config


def _files(folder: Path) -> dict[str, str]:
    """SHA-256 by name of an artifact's files; hidden ones are the file manager's."""
    return sums_of(folder, without=MANIFEST, hidden=False, error=ArtifactError)


def cached(folder: Path, keys: Collection[str]) -> Artifact | None:
    """The published artifact if it was built with one of ``keys`` and is whole, else None: build it again."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        return open_artifact(folder) if read_manifest(folder).key in keys else None
    except ArtifactError:
        return None


@contextmanager
def build_lock(target: Path, *, wait: bool, waiting: Any = None) -> Iterator[None]:
    """Only one process builds ``target``. The kernel frees the lock when its holder dies.

    Args:
        wait: wait for the other build instead of failing.
        waiting: called once, without arguments, when there is something to wait for.

    Raises:
        BuildLockedError: another process holds it and ``wait`` is false.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
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


def publish(staged: Path, target: Path, manifest: Manifest) -> Artifact:
    """Write the manifest and ``put_in_place``."""
    (staged / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    put_in_place(staged, target)
    return Artifact(path=target, manifest=manifest)


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


def staged_manifest(staged: Path, *, plan: Plan, verdict: str, **fields: Any) -> Manifest:
    """The manifest of a finished staging folder; checksums and size are taken from the files."""
    files = _files(staged)
    found = {
        "files": files,
        "size_bytes": sum((staged / name).stat().st_size for name in files),
        "python": platform.python_version(),
        "claim": plan.verification.claim(verdict),
    }
    return Manifest.model_validate({"plan": plan, "verdict": verdict, **found, **fields})


def replace_verdict(artifact: Artifact, staged: Path, verdict: str) -> Artifact:
    """Publish ``staged``, a copy of ``artifact`` with a new report, under a new verdict."""
    found_anew = {"plan", "files", "size_bytes", "python", "verdict", "claim"}
    old = json.loads(artifact.manifest.model_dump_json(exclude=found_anew))
    manifest = staged_manifest(staged, plan=artifact.manifest.plan, verdict=verdict, **old)
    return publish(staged, artifact.path, manifest)
