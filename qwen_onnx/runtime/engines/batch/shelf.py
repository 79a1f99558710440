"""The adapters that an engine holds: those it was started with, and those that come and go within a budget."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import onnxruntime as ort

from qwen_onnx.artifact.adapter_file import Host, SlotAdapter, graph_digest, read_adapter_file
from qwen_onnx.artifact.adapter_slots import Slots, read_slots
from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.artifact.manifest import read_manifest
from qwen_onnx.errors import ArtifactError, ConflictError, OverloadedError, QwenOnnxError, RequestError
from qwen_onnx.runtime.engines.adapters import AdapterSource, Loaded, Swapping

log = logging.getLogger(__name__)


class Shelf:
    """Adapters by name. Whoever changes it sees to it that nobody else does so meanwhile.

    Args:
        folder: of the artifact.
        session: with its graph.
        fixed: that stay; they are not counted into the budget.
        swapping: None: no others come.
        filled: inputs of the slots that the graph was loaded with; None: all of them.

    Raises:
        ArtifactError: the graph has no slots, an adapter does not fit, or is another file than it was.
    """

    def __init__(
        self,
        folder: Path,
        session: ort.InferenceSession,
        fixed: Sequence[AdapterSource] = (),
        swapping: Swapping | None = None,
        filled: Collection[str] | None = None,
    ) -> None:
        # least recently used first
        self._held: dict[str, SlotAdapter] = {}
        self._fixed = frozenset(source.name for source in fixed)
        self._budget = swapping.budget if swapping else 0
        self._host: Host | None = None
        if not fixed and swapping is None:
            return
        # not for those who serve none
        from qwen_onnx.sources.fetch import weights_digest

        slots = read_slots(session.get_modelmeta().custom_metadata_map, str(folder))
        _require_slots(slots, session, folder, filled)
        manifest, graph = read_manifest(folder), GenaiConfig.read(folder).graph_file
        self._host = Host(slots, weights_digest(manifest.source.files), graph_digest(manifest, graph))
        self._held = {source.name: self.read(source) for source in fixed}
        for source in swapping.sources if swapping else ():
            try:
                self.put(source.name, self.read(source), busy=())
            except QwenOnnxError as error:
                log.error("the adapter %s is not loaded again: %s", source.name, error.what)

    def __getitem__(self, name: str) -> SlotAdapter:
        return self._held[name]

    def told(self) -> tuple[Loaded, ...]:
        """What it holds, by name."""
        return tuple(
            Loaded(
                name,
                adapter.digest,
                adapter.bytes,
                adapter.record.rank,
                adapter.record.targets,
                adapter.record.verdict,
                adapter.record.drift.verdict if adapter.record.drift else None,
                name in self._fixed,
            )
            for name, adapter in sorted(self._held.items())
        )

    def read(self, source: AdapterSource) -> SlotAdapter:
        """An adapter that fits; it is not held yet.

        Raises:
            RequestError: this engine takes none. ArtifactError: see ``read_adapter_file``; or it has changed.
        """
        if self._host is None:
            raise RequestError("this server takes no adapters while it runs", where="name")
        adapter = read_adapter_file(source.file, self._host)
        if adapter.digest != source.digest:
            raise ArtifactError(f"the adapter {source.name} has changed", where=str(source.file), hint="start again")
        return adapter

    def used(self, name: str) -> SlotAdapter:
        """The adapter of a request, which is thereby the last that was used.

        Raises:
            RequestError: none has this name.
        """
        if name not in self._held:
            raise RequestError(f"there is no adapter {name[:80]!r}", where="model")
        self._held[name] = self._held.pop(name)
        return self._held[name]

    def put(self, name: str, adapter: SlotAdapter, busy: Collection[str | None]) -> list[str]:
        """Hold an adapter; the very same one may be held already.

        Args:
            busy: names that nothing may be dropped of.

        Returns:
            The least recently used ones, which made room.

        Raises:
            ConflictError: another one has the name. RequestError: it exceeds the budget alone.
            OverloadedError: those that fill the budget are all busy.
        """
        held = self._held.get(name)
        if held is not None and held.digest == adapter.digest:
            self.used(name)
            return []
        if held is not None:
            raise ConflictError(f"another adapter is loaded as {name}; unload it first", where="name")
        if adapter.bytes > self._budget:
            raise RequestError(f"it has {adapter.bytes:,} bytes, adapters may have {self._budget:,}", where="name")
        swapped = [each for each in self._held if each not in self._fixed]
        room = self._budget - sum(self._held[each].bytes for each in swapped)
        dropped = []
        for each in (each for each in swapped if each not in busy):
            if room >= adapter.bytes:
                break
            room += self._held[each].bytes
            dropped.append(each)
        if room < adapter.bytes:
            raise OverloadedError("answers by other adapters are under way, and they fill the budget", retry_after=5)
        for each in dropped:
            del self._held[each]
        self._held[name] = adapter
        return dropped

    def drop(self, name: str, busy: Collection[str | None]) -> None:
        """Hold an adapter no longer.

        Raises:
            RequestError: it is not held. ConflictError: it is busy, or stays.
        """
        if name not in self._held:
            raise RequestError(f"there is no adapter {name[:80]!r}", where="name")
        if name in self._fixed:
            raise ConflictError(f"{name} was given by --adapter and stays", where="name")
        if name in busy:
            raise ConflictError(f"answers by {name} are under way; try again when they have ended", where="name")
        del self._held[name]


def _require_slots(
    slots: Slots, session: ort.InferenceSession, folder: Path, filled: Collection[str] | None = None
) -> None:
    """ArtifactError where the metadata tells of a slot that the graph has not, or has in another size."""
    inputs = {entry.name: entry for entry in session.get_overridable_initializers()}
    for slot in slots.slots:
        if filled is not None and not {slot.a, slot.b} & set(filled):
            continue
        for name, place, size in ((slot.a, 0, slot.inputs), (slot.b, 1, slot.outputs)):
            entry = inputs.get(name)
            known = entry is not None and entry.type == "tensor(float)" and len(entry.shape) == 2
            if entry is None or not known or entry.shape[place] != size:
                raise ArtifactError(
                    f"the graph has no input {name} of {size}, of which its metadata tells",
                    where=str(folder),
                    hint="get the artifact again, or build it",
                )
