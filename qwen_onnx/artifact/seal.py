"""What is loaded is what was verified: nothing in a folder may change between the two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwen_onnx.artifact.checksums import SUMS, package_digest
from qwen_onnx.artifact.manifest import MANIFEST, open_runnable
from qwen_onnx.errors import ArtifactError
from qwen_onnx.files import sha256_of

Standing = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Seal:
    """A folder whose bytes were verified.

    Args:
        digest: see ``runnable_digest``.
        standing: of every file and folder, from before the first byte was read: device, inode, mode, size, times. The
            time of the last change cannot be set back, so whoever altered a file since shows, even if he restored it.
    """

    folder: Path
    digest: str
    standing: Standing

    def require_untouched(self) -> None:
        """Call it when everything is loaded. ArtifactError when a file was changed since it was verified."""
        now = _standing(self.folder)
        touched = sorted(name for name in now.keys() | self.standing.keys() if now.get(name) != self.standing.get(name))
        if touched:
            raise ArtifactError(
                f"{', '.join(touched)}: changed while the model was loaded", where=str(self.folder), hint="start again"
            )


def runnable_digest(folder: Path) -> str:
    """Pins every byte: SHA-256 of a package's ``SHA256SUMS``, else of the artifact's ``manifest.json``.

    Raises:
        ArtifactError: there is neither.
    """
    if (folder / SUMS).is_file():
        return package_digest(folder)
    if (folder / MANIFEST).is_file():
        return sha256_of(folder / MANIFEST)
    raise ArtifactError(f"neither {SUMS} nor {MANIFEST}: nothing to verify it by", where=str(folder))


def verify_runnable(folder: Path, expect: str | None = None) -> Seal:
    """Check every byte of an artifact or a package.

    Args:
        expect: its digest, from a place that is trusted.

    Raises:
        ArtifactError: it is another one; or a file is missing, altered, or was added.
    """
    standing = _standing(folder)
    digest = runnable_digest(folder)
    if expect is not None and digest != expect.strip().lower():
        raise ArtifactError(
            f"the digest is {digest}, not the expected {expect}", where=str(folder), hint="get it again, or ask why"
        )
    open_runnable(folder)
    seal = Seal(folder, digest, standing)
    seal.require_untouched()
    return seal


def _standing(folder: Path) -> Standing:
    found: Standing = {}
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        found[path.relative_to(folder).as_posix()] = (
            status.st_dev,
            status.st_ino,
            status.st_mode,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )
    return found
