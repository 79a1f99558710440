"""Check a package, offline: nothing but the folder itself and what it says of itself."""

from __future__ import annotations

from pathlib import Path

from qwen_onnx.files import sha256_of
from qwen_onnx.package.checksums import SUMS, check_sums
from qwen_onnx.package.records import Package, read_package


def package_digest(folder: Path) -> str:
    """SHA-256 of ``SHA256SUMS``: pins every byte of a package that passes ``verify_package``."""
    return sha256_of(folder / SUMS)


def verify_package(folder: Path) -> Package:
    """Check every byte of a package; PackageError names every fault."""
    package = read_package(folder)
    check_sums(folder)
    return package
