"""Names that the files of an artifact or a package may have: bare, plain, and of a known kind."""

from __future__ import annotations

import re
from collections.abc import Iterable

BARE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# data, documents and figures; what a machine runs, or what runs when it is read, has no place
SUFFIXES = {
    ".bin",
    ".data",
    ".gguf",
    ".html",
    ".jinja",
    ".json",
    ".jsonl",
    ".log",
    ".md",
    ".npy",
    ".npz",
    ".onnx",
    ".safetensors",
    ".sig",
    ".svg",
    ".txt",
    ".xml",
}
# licences have no suffix, or one that tells whose they are
LICENCE = re.compile(r"SHA256SUMS|(LICENSE|NOTICE)S?(-[A-Za-z0-9-]+)?(\.(txt|md|qwen-onnx))?")


def name_faults(names: Iterable[str]) -> list[str]:
    """What is wrong with each name; empty when all are allowed."""
    return [f"{name!r} is not a name of a file that a model needs" for name in sorted(names) if not _allowed(name)]


def _allowed(name: str) -> bool:
    dot = name.rfind(".")
    known = bool(LICENCE.fullmatch(name)) or (dot > 0 and name[dot:] in SUFFIXES)
    return known and BARE.fullmatch(name) is not None
