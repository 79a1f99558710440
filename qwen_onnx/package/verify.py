"""Is a package what it says: checksums and rules."""

from __future__ import annotations

from pathlib import Path

from qwen_onnx.package.checksums import check_sums
from qwen_onnx.package.records import Package, read_package


def verify_package(folder: Path) -> Package:
    """The package, when its bytes are those that were listed; PackageError with every fault."""
    package = read_package(folder)
    check_sums(folder)
    return package
