"""SHA256SUMS: every file of a folder, in the format of sha256sum(1)."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from qwen_onnx.bounded import Fault, open_plain, read_bytes
from qwen_onnx.errors import PackageError

SUMS = "SHA256SUMS"
# a line is about 100 bytes
MOST_BYTES = 1 << 20
LINE = re.compile(r"([0-9a-f]{64})  ([^\\\n]+)")


def sums_of(folder: Path, *, without: str = SUMS, hidden: bool = True, error: Fault = PackageError) -> dict[str, str]:
    """SHA-256 by name of every file in ``folder``, ``without`` apart; sorted by name.

    Args:
        hidden: whether files and folders with a leading dot count.

    Raises:
        error: something in it is neither a file nor a folder of files, or has a name that cannot be listed. Nothing is
            read before all of it is known to be plain.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not hidden and any(part.startswith(".") for part in name.split("/")):
            continue
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise error(f"{name} is not a plain file", where=str(folder))
        if path.is_file() and name != without:
            if not LINE.fullmatch(f"{'0' * 64}  {name}"):
                raise error(f"{name!r} cannot stand in {SUMS}", where=str(folder))
            found.append(name)
    return {name: sha256_of_plain(folder / name, error) for name in found}


def sha256_of_plain(path: Path, error: Fault = PackageError) -> str:
    """SHA-256 of a plain file, in hex; ``error`` for a link, a pipe or a device."""
    with open_plain(path, error) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(listed: dict[str, str], found: dict[str, str]) -> list[str]:
    """Every file that is missing, was added, or was altered."""
    both = sorted(listed.keys() & found.keys())
    return [
        *(f"{name} is missing" for name in sorted(listed.keys() - found.keys())),
        *(f"{name} was added" for name in sorted(found.keys() - listed.keys())),
        *(f"{name} was altered" for name in both if listed[name] != found[name]),
    ]


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
        text = read_bytes(path, most_bytes=MOST_BYTES, error=PackageError).decode("utf-8")
    except UnicodeDecodeError as error:
        raise PackageError(f"{SUMS} is damaged", where=str(path)) from error
    matches = [LINE.fullmatch(line) for line in text.splitlines()]
    sums = {match[2]: match[1] for match in matches if match}
    if rendered(sums) != text:
        raise PackageError(f"{SUMS} is damaged", where=str(path))
    return sums


def check_sums(folder: Path) -> dict[str, str]:
    """Compare every file with ``SHA256SUMS`` and return what it lists.

    Raises:
        PackageError: names every file that is missing, altered, or was added.
    """
    listed = read_sums(folder)
    if faults := differences(listed, sums_of(folder)):
        raise PackageError("; ".join(faults), where=str(folder), hint="get it again from where it came")
    return listed
