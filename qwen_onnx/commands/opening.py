"""Open what a verb runs: an artifact, or a package of one."""

from __future__ import annotations

from pathlib import Path


def open_model(folder: Path) -> tuple[Path, str]:
    """Compare every byte of an artifact or package with what it lists.

    Returns:
        Its folder and the id of its model.

    Raises:
        ArtifactError, PackageError: it is neither, or was altered.
    """
    from qwen_onnx.artifact import open_artifact
    from qwen_onnx.package.checksums import check_sums
    from qwen_onnx.package.records import PACKAGE, read_package

    path = folder.resolve()
    if (path / PACKAGE).exists():
        record = read_package(path).record
        check_sums(path)
        return path, record.model
    return path, open_artifact(path).manifest.plan.model
