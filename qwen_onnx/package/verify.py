"""Every fault of a package at once."""

from __future__ import annotations

from pathlib import Path

from qwen_onnx.package.checksums import check_sums
from qwen_onnx.package.records import Package, read_package


def verify_package(folder: Path) -> Package:
    """Read ``package.json`` and compare every file with ``SHA256SUMS``.

    Raises:
        PackageError: it is not a package, or a file is missing, altered or was added.
    """
    package = read_package(folder)
    check_sums(folder)
    return package
