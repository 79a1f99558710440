"""Fonts of packages of the Python package index; those of the exam are not among those of the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

TRAINING = ("font_roboto", "font_source_sans_pro", "font_source_serif_pro", "font_caladea", "font_manrope")
EXAM = ("font_lato", "font_hanken_grotesk", "font_fredoka_one")


def fonts_in(folder: Path, names: Sequence[str]) -> list[str]:
    """Font files of packages that pip put into ``folder``, in an order that does not depend on the disk."""
    found = [str(path) for name in names for path in sorted((folder / name).glob("files/*.[ot]tf"))]
    if not found:
        packages = " ".join(name.replace("_", "-") for name in names)
        raise SystemExit(f"{folder}: no fonts; put them there: pip install --no-deps --target {folder} {packages}")
    return found
