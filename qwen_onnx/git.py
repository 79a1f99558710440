"""The state of the git checkout that this code runs from."""

from __future__ import annotations

import subprocess

from pydantic import Field

from qwen_onnx.errors import EnvironmentFault
from qwen_onnx.files import PACKAGE
from qwen_onnx.records import COMMIT, Record


class Checkout(Record):
    """``dirty``: something in it differs from the commit, or was added and is not ignored."""

    revision: str = Field(pattern=f"^{COMMIT}$")
    dirty: bool


def this_checkout() -> Checkout | None:
    """Commit and state of the checkout; None when this code was installed.

    Raises:
        EnvironmentFault: there is a checkout, but git cannot read it.
    """
    root = PACKAGE.parent
    # not what git finds further up: an installed package may lie below someone else's repository
    if not (root / ".git").exists():
        return None
    return Checkout(revision=_git("rev-parse", "HEAD").strip(), dirty=bool(_git("status", "--porcelain").strip()))


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PACKAGE.parent), *arguments]
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise EnvironmentFault(f"git cannot read the checkout: {said}", hint="git status") from error
