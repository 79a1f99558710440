"""The folder that clients may load adapters from: by bare names, so that no request names a path."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

from qwen_onnx.artifact.adapter_file import NAME_PATTERN
from qwen_onnx.bounded import open_plain
from qwen_onnx.errors import ArtifactError, RequestError

ENDING = ".safetensors"
# looked at, and told
MOST_FILES = 1000


class AdapterFolder:
    """Adapters as files ``NAME.safetensors``; links are none of them.

    Args:
        budget: bytes that all loaded ones may have together.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self._folder, self.budget = folder.resolve(), budget

    def names(self) -> list[str]:
        """Those that can be loaded now, sorted."""
        with os.scandir(self._folder) as found:
            entries = [entry for entry in itertools.islice(found, MOST_FILES) if entry.name.endswith(ENDING)]
        names = [entry.name.removesuffix(ENDING) for entry in entries if entry.is_file(follow_symlinks=False)]
        return sorted(name for name in names if re.fullmatch(NAME_PATTERN, name))

    def path(self, name: str) -> Path | None:
        """Where an adapter is, if something has its name; nothing is known of what."""
        path = self._folder / f"{name}{ENDING}"
        return path if re.fullmatch(NAME_PATTERN, name) and os.path.lexists(path) else None

    def file(self, name: str) -> Path | None:
        """The file of an adapter; None where there is none of that name.

        Raises:
            RequestError: it is a link, a folder or a pipe, or larger than all of them may be.
        """
        path = self.path(name)
        if path is None:
            return None
        try:
            with open_plain(path, ArtifactError) as opened:
                size = os.fstat(opened.fileno()).st_size
        except ArtifactError as error:
            raise RequestError(error.what, where="name") from error
        if size > self.budget:
            raise RequestError(f"it has {size:,} bytes, adapters may have {self.budget:,}", where="name")
        return path
