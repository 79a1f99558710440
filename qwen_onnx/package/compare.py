"""Are two builds the same? Byte by byte, but for files that hold what was measured, or when."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

from qwen_onnx.artifact.checksums import SUMS, sha256_of_plain, sums_of
from qwen_onnx.artifact.manifest import MANIFEST, read_manifest
from qwen_onnx.errors import PackageError
from qwen_onnx.package.records import LEFT_BEHIND, MEASURED, PACKAGE, read_package

# of a manifest, what is measured or depends on it
UNSTABLE = {"files", "size_bytes", "verdict", "claim", "built_seconds", "python", "checkout"}


class Relation(StrEnum):
    """How a file of one folder stands to that of the other."""

    SAME = "same"
    MEASURED = "differs, is measured"
    DIFFERENT = "differs"
    MISSING = "is in one only"

    @property
    def proves_a_difference(self) -> bool:
        """Whether the two builds cannot be the same."""
        return self in (Relation.DIFFERENT, Relation.MISSING)


def compare(one: Path, other: Path) -> dict[str, Relation]:
    """Compare two artifacts or two packages file by file, those of any subfolder too.

    A manifest holds both: it differs when anything but what was measured differs in it.

    Raises:
        PackageError, ArtifactError: one of them is neither, or they are not of one kind.
    """
    kinds = [_kind(folder) for folder in (one, other)]
    if kinds[0] != kinds[1]:
        raise PackageError(
            f"one is {kinds[0]}, the other {kinds[1]}", where=f"{one} and {other}", hint="compare two of a kind"
        )
    sums = [_sums(folder) for folder in (one, other)]
    found = {name: _relation(name, sums[0].get(name), sums[1].get(name)) for name in sorted(sums[0] | sums[1])}
    if found[MANIFEST] is Relation.MEASURED and _stable(one) != _stable(other):
        found[MANIFEST] = Relation.DIFFERENT
    return found


def _kind(folder: Path) -> str:
    """Package or artifact; reads what each says of itself, so that a folder that is neither is told."""
    if (folder / PACKAGE).exists():
        read_package(folder)
        return "a package"
    read_manifest(folder)
    return "an artifact"


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 by name, ``SHA256SUMS`` included where there is one."""
    return sums_of(folder) | ({SUMS: sha256_of_plain(folder / SUMS)} if (folder / SUMS).exists() else {})


def _relation(name: str, one: str | None, other: str | None) -> Relation:
    if one == other:
        return Relation.SAME
    if name in MEASURED or name in LEFT_BEHIND:
        return Relation.MEASURED
    return Relation.MISSING if one is None or other is None else Relation.DIFFERENT


def _stable(folder: Path) -> dict[str, Any]:
    return read_manifest(folder).model_dump(mode="json", exclude=UNSTABLE)
