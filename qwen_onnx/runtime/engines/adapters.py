"""Adapters that an engine is given, and how they reach the slots of its graph."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from qwen_onnx.artifact.adapter_file import HINT, NAME_PATTERN, SlotAdapter, read_adapter_file
from qwen_onnx.artifact.adapter_slots import Slots, read_slots
from qwen_onnx.artifact.manifest import read_manifest
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


def load_adapters(
    folder: Path, session: ort.InferenceSession, sources: Sequence[AdapterSource]
) -> dict[str, SlotAdapter]:
    """The adapters by their names.

    Args:
        folder: of the artifact.
        session: with its graph.

    Raises:
        ArtifactError: the graph has no slots, an adapter does not fit, or is another file than it was.
    """
    # not for those who serve none
    from qwen_onnx.sources.fetch import weights_digest

    if not sources:
        return {}
    slots = read_slots(session.get_modelmeta().custom_metadata_map, str(folder))
    _require_slots(slots, session, folder)
    weights = weights_digest(read_manifest(folder).source.files)
    found = {}
    for source in sources:
        found[source.name] = read_adapter_file(source.file, slots, weights)
        if found[source.name].digest != source.digest:
            raise ArtifactError(f"the adapter {source.name} has changed", where=str(source.file), hint="start again")
    return found


def _require_slots(slots: Slots, session: ort.InferenceSession, folder: Path) -> None:
    """ArtifactError where the metadata tells of a slot that the graph has not, or has in another size."""
    inputs = {entry.name: entry for entry in session.get_overridable_initializers()}
    for slot in slots.slots:
        for name, place, size in ((slot.a, 0, slot.inputs), (slot.b, 1, slot.outputs)):
            entry = inputs.get(name)
            known = entry is not None and entry.type == "tensor(float)" and len(entry.shape) == 2
            if entry is None or not known or entry.shape[place] != size:
                raise ArtifactError(
                    f"the graph has no input {name} of {size}, of which its metadata tells",
                    where=str(folder),
                    hint="get the artifact again, or build it",
                )
