"""Python environments of their own, for targets whose packages cannot stand beside ours.

They are made below the cache when a target first needs them, by venv and pip, one for each set of requirements.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from pydantic import Field

from qwen_onnx.errors import EnvironmentFault
from qwen_onnx.files import PACKAGE
from qwen_onnx.records import Name, Reason, Record, digest_of

Progress = Callable[[str], None]
STAMP = ".ready"
ANNOUNCED_PYTHON, ANNOUNCED_PACKAGE = "QWEN_ONNX_TARGET_PYTHON", "QWEN_ONNX_TARGET_PACKAGE"


class Environment(Record):
    """Packages that cannot stand beside ours: ``pipelines/environments/<name>.yaml``, made when a target needs it."""

    name: Name
    requirements: tuple[str, ...] = Field(min_length=1, description="pinned, as pip takes them")
    removed: dict[Name, Reason] = Field(default_factory=dict, description="packages that pip pulls in and that must go")
    bytes: int = Field(gt=0, description="disk that it takes")
    olive: bool = Field(default=False, description="Olive itself runs in it, not only what was built")


@dataclass(frozen=True)
class Interpreter:
    """A Python and the folder from which it imports this package, and nothing else of ours."""

    python: Path
    package: Path

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables for a process of it; without PYTHONSAFEPATH the working directory would come first."""
        own = {"PYTHONPATH": str(self.package), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        return {**os.environ, **own}

    def announced(self) -> dict[str, str]:
        """Environment variables that tell a process of another Python where this one is: ``announced_interpreter``."""
        return {ANNOUNCED_PYTHON: str(self.python), ANNOUNCED_PACKAGE: str(self.package)}


def announced_interpreter() -> Interpreter:
    """The Python of the target's environment, in a process that runs in ours.

    Raises:
        EnvironmentFault: the process was not told.
    """
    try:
        return Interpreter(Path(os.environ[ANNOUNCED_PYTHON]), Path(os.environ[ANNOUNCED_PACKAGE]))
    except KeyError as error:
        raise EnvironmentFault(
            f"the environment variable {error.args[0]} is not set: this step needs another environment",
            hint="name one in the pipeline: environment: NAME",
        ) from error


def own_interpreter() -> Interpreter:
    """The Python that runs this, with this package and whatever is beside it."""
    return Interpreter(Path(sys.executable), PACKAGE.parent)


def place_of(environment: Environment, cache: Path) -> Path:
    """Folder of ``environment``: another set of requirements has another folder."""
    identity = {**environment.model_dump(mode="json"), "python": sys.version_info[:2]}
    return cache / "environments" / f"{environment.name}-{digest_of(identity)[:12]}"


def is_ready(environment: Environment, cache: Path) -> bool:
    """Whether it is there, whole."""
    return (place_of(environment, cache) / STAMP).exists()


def interpreter_of(environment: Environment, cache: Path, progress: Progress) -> Interpreter:
    """The Python of ``environment``, which is made when it is not there.

    Raises:
        EnvironmentFault: pip could not install its packages.
    """
    folder = place_of(environment, cache)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / STAMP).exists():
            progress(f"environment {environment.name}: installing {len(environment.requirements)} packages, once")
            _make(environment, folder)
        return Interpreter(_python(folder), _linked_package(folder))


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _make(environment: Environment, folder: Path) -> None:
    """The stamp comes last, so that an interrupted installation is done again."""
    shutil.rmtree(folder, ignore_errors=True)
    _run(environment, [sys.executable, "-m", "venv", str(folder)])
    pip = [str(_python(folder)), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _run(environment, [*pip, "install", "--no-compile", *environment.requirements])
    if environment.removed:
        _run(environment, [*pip, "uninstall", "--yes", *environment.removed])
    (folder / STAMP).touch()


def _linked_package(folder: Path) -> Path:
    """A folder with this package alone; checkouts that share a cache have one each in the environment.

    Not the folder above this package: installed from a wheel, it is full of the packages that must not be seen.
    """
    packages = folder / "packages" / digest_of(str(PACKAGE))[:12]
    packages.mkdir(parents=True, exist_ok=True)
    link = packages / PACKAGE.name
    if not link.is_symlink():
        link.symlink_to(PACKAGE, target_is_directory=True)
    return packages


def _run(environment: Environment, command: list[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
        raise EnvironmentFault(
            f"the environment {environment.name} cannot be made: {errors[-1][:500]}",
            where=f"pipelines/environments/{environment.name}.yaml",
            hint="a package index must be reachable; pip config list shows which one is asked",
        )
