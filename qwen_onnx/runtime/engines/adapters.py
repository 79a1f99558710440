"""Adapters that an engine is given, from the start or while it runs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_onnx.artifact.adapter_file import HINT, NAME_PATTERN
from qwen_onnx.bounded import open_plain
from qwen_onnx.errors import ArtifactError, ConfigError


@dataclass(frozen=True)
class AdapterSource:
    """An adapter by the name that requests have for it.

    Args:
        digest: SHA-256 of the file, which may not change while it is served: an engine that dies is started again.
    """

    name: str
    file: Path
    digest: str

    @classmethod
    def of(cls, name: str, file: Path) -> AdapterSource:
        """With the digest that the file has now.

        Raises:
            ArtifactError: it cannot be read. ConfigError: it cannot be called so.
        """
        if not re.fullmatch(NAME_PATTERN, name):
            fault = f"--adapter {name[:80]}: a name has 1 to 60 of a-z, 0-9, '.', '_' and '-', first a letter or digit"
            raise ConfigError([fault])
        with open_plain(file, ArtifactError, hint=HINT) as opened:
            return cls(name, file.resolve(), hashlib.file_digest(opened, "sha256").hexdigest())


@dataclass(frozen=True)
class Swapping:
    """Adapters that come and go while an engine runs.

    Args:
        budget: bytes that they have together; the least recently used ones make room.
        sources: to begin with; one that cannot be loaded is left out. An engine that died had them.
    """

    budget: int
    sources: tuple[AdapterSource, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """An adapter that an engine holds.

    Args:
        bytes: in memory.
        verdict: of its training; drift: of its answers by an artifact, if that was measured.
        fixed: it was given at the start and stays.
    """

    name: str
    digest: str
    bytes: int
    rank: int
    targets: tuple[str, ...]
    verdict: str
    drift: str | None
    fixed: bool


def parse_adapters(given: Sequence[str]) -> dict[str, Path]:
    """Files by name, of ``NAME=FILE`` each.

    Raises:
        ConfigError: every one that is something else or has a name that another has.
    """
    found: dict[str, Path] = {}
    faults = []
    for text in given:
        name, separator, file = text.partition("=")
        if not (name and separator and file):
            faults.append(f"--adapter {text[:200]}: not NAME=FILE")
        elif name in found:
            faults.append(f"--adapter {name[:80]}: given twice")
        else:
            found[name] = Path(file)
    if faults:
        raise ConfigError(faults, hint="qwen-onnx serve ARTIFACT --adapter faq=faq.safetensors")
    return found
