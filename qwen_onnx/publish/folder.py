"""A package's folder as a source; as a destination ``receive`` is enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_onnx.errors import PublishError
from qwen_onnx.publish.bundle import BLOCK
from qwen_onnx.sources.remote import RemoteFile


def blocks_of(path: Path, offset: int) -> Iterator[bytes]:
    """The bytes of a local file from ``offset`` on."""
    with path.open("rb") as file:
        file.seek(offset)
        while block := file.read(BLOCK):
            yield block


class FolderSource:
    """The files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def listing(self) -> list[RemoteFile]:
        """Every file below the folder.

        Raises:
            PublishError: there is no folder, or it holds a link or a special file.
        """
        if not self._folder.is_dir():
            raise PublishError("there is no package", where=str(self._folder), hint="qwen-onnx publish PACKAGE FOLDER")
        found = []
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise PublishError(f"{name} is not a plain file", where=str(self._folder))
            if path.is_file():
                found.append(RemoteFile(name, path.stat().st_size))
        return found

    @contextmanager
    def read(self, file: RemoteFile, offset: int) -> Iterator[Iterator[bytes]]:
        """The bytes of ``file`` from ``offset`` on."""
        yield blocks_of(self._folder / file.name, offset)
