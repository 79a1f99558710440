"""What a checkpoint folder may hold: plain files, and links only as Hugging Face's own cache makes them.

In that cache ``snapshots/REVISION/NAME`` is a link to ``blobs/DIGEST`` of the same repository.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from qwen_onnx.errors import SourceError

# endings of weights that run code when they are loaded
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
HINT = "copy what it leads to into the folder, if you trust it"


def require_plain(folder: Path) -> None:
    """Look at every visible file below ``folder`` without opening one.

    Raises:
        SourceError: a pipe, a device, a link to a folder, or a link that leads out of the checkpoint.
    """
    top = folder.resolve()
    for place, folders, names in os.walk(top):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*folders, *names]:
            path = Path(place, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                _require_own_target(path, top)
            # a hidden file is not read, whatever it is
            elif not name.startswith(".") and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise SourceError(f"{path.relative_to(top)} is not a plain file", where=str(top), hint=HINT)


def _require_own_target(path: Path, top: Path) -> None:
    homes = [top, *([top.parent.parent / "blobs"] if top.parent.name == "snapshots" else [])]
    try:
        target = path.resolve(strict=True)
        own = stat.S_ISREG(target.lstat().st_mode) and any(target.is_relative_to(home) for home in homes)
    # RuntimeError: links that lead to each other
    except (OSError, RuntimeError):
        own = False
    if not own:
        raise SourceError(
            f"{path.relative_to(top)} is a link that leads out of the checkpoint", where=str(top), hint=HINT
        )
