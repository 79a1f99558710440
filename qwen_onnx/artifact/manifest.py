"""An artifact is a value: a folder, whole or absent, that says what it is and how it was made.

``manifest.json`` lists every file with its SHA-256, the plan, the source and the versions that shaped it.
Builders write into a hidden folder beside the target; ``publish`` swaps it in by one rename.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from qwen_onnx import __version__
from qwen_onnx.artifact.checksums import SUMS, check_sums, differences, sums_of
from qwen_onnx.artifact.genai_config import GENAI_CONFIG, GenaiConfig
from qwen_onnx.artifact.names import name_faults
from qwen_onnx.artifact.store import put_in_place
from qwen_onnx.bounded import read_description
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.catalog.schema import About, Verification
from qwen_onnx.errors import ArtifactError, EnvironmentFault, PackageError
from qwen_onnx.files import write_whole
from qwen_onnx.git import Checkout
from qwen_onnx.records import Record, Verdict, digest_of

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
        about: what the model is for; None: built before that was recorded.
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
    about: About | None = None
    source: SourceRecord
    packages: dict[str, str]
    python: str
    checkout: Checkout | None = None
    files: dict[str, str]
    size_bytes: int
    readback: dict[str, Any]
    verdict: Verdict
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
    for name in config.files:
        if name not in files:
            raise ArtifactError(f"{GENAI_CONFIG} names {name}, which is not a file of it", where=str(folder), hint=HINT)
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


def about_anew(artifact: Artifact, about: About | None) -> Artifact:
    """The artifact, its manifest with this ``about``: no step of a build reads it, so that nothing else changes."""
    if artifact.manifest.about == about:
        return artifact
    manifest = artifact.manifest.model_copy(update={"about": about})
    write_whole(artifact.path / MANIFEST, manifest.model_dump_json(indent=1))
    return Artifact(path=artifact.path, manifest=manifest)


def publish(staged: Path, target: Path, manifest: Manifest) -> Artifact:
    """Write the manifest and ``put_in_place``."""
    (staged / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    put_in_place(staged, target)
    return Artifact(path=target, manifest=manifest)


def staged_manifest(
    staged: Path, *, plan: Plan, verdict: str, level: Verification | None = None, **fields: Any
) -> Manifest:
    """The manifest of a finished staging folder; checksums and size are taken from the files.

    Args:
        level: at which it was judged; None: the target's own.
    """
    files = _files(staged)
    found = {
        "files": files,
        "size_bytes": sum((staged / name).stat().st_size for name in files),
        "python": platform.python_version(),
        "claim": plan.claim(verdict, level),
    }
    return Manifest.model_validate({"plan": plan, "verdict": verdict, **found, **fields})


def replace_verdict(artifact: Artifact, staged: Path, verdict: str, level: Verification) -> Artifact:
    """Publish ``staged``, a copy of ``artifact`` with a new report, under a new verdict, found at ``level``."""
    found_anew = {"plan", "files", "size_bytes", "python", "verdict", "claim"}
    old = json.loads(artifact.manifest.model_dump_json(exclude=found_anew))
    manifest = staged_manifest(staged, plan=artifact.manifest.plan, verdict=verdict, level=level, **old)
    return publish(staged, artifact.path, manifest)
