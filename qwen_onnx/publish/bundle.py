"""A verified package as a list of files, and the guard that uploads are the bytes that were verified."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen_onnx.artifact.checksums import SUMS, read_sums
from qwen_onnx.errors import PublishError
from qwen_onnx.files import sha256_of
from qwen_onnx.package.adapters import AdapterPackage, AdapterPackageRecord, read_any, verify_any
from qwen_onnx.package.records import Package, PackageRecord

BLOCK = 1 << 20


@dataclass(frozen=True)
class Item:
    """A file of a package as it was verified; ``size`` in bytes."""

    name: str
    path: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """A package that passed.

    Attributes:
        items: all its files, ``SHA256SUMS`` too.
        digest: SHA-256 of ``SHA256SUMS``: it stands for every byte, and is the same at every destination.
    """

    package: Package | AdapterPackage
    items: tuple[Item, ...]
    digest: str

    @property
    def size(self) -> int:
        """Sum over all files, in bytes."""
        return sum(item.size for item in self.items)


def require_pass(record: PackageRecord | AdapterPackageRecord, where: str) -> None:
    """Only what passed leaves or enters; there is no option around it.

    Raises:
        PublishError: the verdict is not PASS, or the package was made with ``--allow-unverified``.
    """
    if record.verdict != "PASS" or record.unverified:
        raise PublishError(
            f"{record.id}: the verdict is {record.verdict}{', unverified' if record.unverified else ''}; "
            "only PASS is published or pulled",
            where=where,
            hint="qwen-onnx verify ARTIFACT, then qwen-onnx package ARTIFACT",
        )


def open_bundle(folder: Path) -> Bundle:
    """Verify a package before a byte of it leaves.

    Raises:
        PackageError: it is not a package, or breaks a rule.
        PublishError: its verdict is not PASS, or it changed while it was verified.
    """
    # by its own word first: gigabytes need not be hashed to refuse it
    require_pass(read_any(folder).record, str(folder))
    package = verify_any(folder)
    require_pass(package.record, str(folder))
    sums = read_sums(folder)
    sums[SUMS] = sha256_of(folder / SUMS)
    items = (Item(name, folder / name, (folder / name).stat().st_size, digest) for name, digest in sorted(sums.items()))
    return Bundle(package, tuple(items), sums[SUMS])


def checked_blocks(item: Item, sent: Callable[[int], None] | None = None) -> Iterator[bytes]:
    """The bytes of a file; the last of them come only when they are all as verified.

    Args:
        sent: told the size of each block, once the next one is asked for.

    Raises:
        PublishError: the file changed since it was verified: what was sent of it cannot be mistaken for the whole.
    """
    digest, held = hashlib.sha256(), b""
    with item.path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            if held:
                yield held
                if sent:
                    sent(len(held))
            held = block
    if digest.hexdigest() != item.sha256:
        raise changed(item)
    if held:
        yield held
        if sent:
            sent(len(held))


def checked_bytes(item: Item) -> bytes:
    """The whole of a small file, as verified; raises like ``checked_blocks``."""
    return b"".join(checked_blocks(item))


def changed(item: Item) -> PublishError:
    """The error for a file that is no longer what was verified."""
    return PublishError(
        f"{item.name} changed after it was verified; nothing was published",
        where=str(item.path),
        hint="package the artifact again",
    )


class CheckedFile(io.BufferedIOBase):
    """A file for a hub's client, which reads as often as it likes: each pass from the start is compared.

    Reading in order up to the end raises PublishError in place of the last block when the bytes are not those
    that were verified. A pass that jumps is not compared here; the hub compares what it gets with the digest.
    """

    def __init__(self, item: Item, sent: Callable[[int], None] | None = None) -> None:
        self._item, self._sent = item, sent
        self._file = item.path.open("rb")
        self._digest, self._hashed = hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        place = self._file.seek(offset, whence)
        if place == 0:
            self._digest, self._hashed = hashlib.sha256(), 0
        return place

    def read(self, size: int | None = -1, /) -> bytes:
        place = self._file.tell()
        block = self._file.read(-1 if size is None else size)
        if place == self._hashed:
            self._digest.update(block)
            self._hashed += len(block)
            # no block: the file became shorter
            whole = self._hashed >= self._item.size or (not block and size != 0)
            if whole and self._digest.hexdigest() != self._item.sha256:
                raise changed(self._item)
        if self._sent:
            self._sent(len(block))
        return block

    def close(self) -> None:
        self._file.close()
        super().close()
