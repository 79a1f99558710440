"""SHA256SUMS: every file of a folder, in the format of sha256sum(1)."""

from __future__ import annotations

import re
from pathlib import Path

from qwen_onnx.errors import PackageError
from qwen_onnx.files import sha256_of

SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  ([^\\\n]+)")


def sums_of(folder: Path) -> dict[str, str]:
    """SHA-256 by name of every file in ``folder``, hidden ones too, ``SHA256SUMS`` apart; sorted by name.

    Raises:
        PackageError: something in it is neither a file nor a folder of files, or has a name that cannot be listed.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise PackageError(f"{name} is not a plain file", where=str(folder))
        if path.is_file() and name != SUMS:
            if not LINE.fullmatch(f"{'0' * 64}  {name}"):
                raise PackageError(f"{name!r} cannot stand in {SUMS}", where=str(folder))
            found[name] = sha256_of(path)
    return found


def rendered(sums: dict[str, str]) -> str:
    """The text of ``SHA256SUMS``."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def write_sums(folder: Path) -> None:
    """Write ``SHA256SUMS``; the last step before a folder is put in place."""
    (folder / SUMS).write_text(rendered(sums_of(folder)), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """SHA-256 by name, as listed.

    Raises:
        PackageError: there is no list, or it is not, byte for byte, one that ``write_sums`` writes.
    """
    path = folder / SUMS
    try:
        text = path.read_bytes().decode("utf-8")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise PackageError(f"{SUMS} is missing or damaged", where=str(path)) from error
    matches = [LINE.fullmatch(line) for line in text.splitlines()]
    sums = {match[2]: match[1] for match in matches if match}
    if rendered(sums) != text:
        raise PackageError(f"{SUMS} is damaged", where=str(path))
    return sums


def package_digest(folder: Path) -> str:
    """SHA-256 of ``SHA256SUMS``: pins every byte of a package that passes ``check_sums``."""
    return sha256_of(folder / SUMS)


def check_sums(folder: Path) -> dict[str, str]:
    """Compare every file with ``SHA256SUMS`` and return what it lists.

    Raises:
        PackageError: names every file that is missing, altered, or was added.
    """
    listed, found = read_sums(folder), sums_of(folder)
    faults = [f"{name} is missing" for name in sorted(listed.keys() - found.keys())]
    faults += [f"{name} was added" for name in sorted(found.keys() - listed.keys())]
    faults += [f"{name} was altered" for name in sorted(listed.keys() & found.keys()) if listed[name] != found[name]]
    if faults:
        raise PackageError("; ".join(faults), where=str(folder), hint="get it again from where it came")
    return listed
