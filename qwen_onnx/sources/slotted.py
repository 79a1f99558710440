"""An adapter in peft's form as a file for an artifact's slots: transposed, scaled, and q, k and v beside each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_onnx.artifact.adapter_file import HINT, AdapterRecord, Base, Floats, Host, graph_digest, write_adapter_file
from qwen_onnx.artifact.adapter_slots import Slot, Slots, slots_of_graph
from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.artifact.manifest import Manifest, open_runnable
from qwen_onnx.errors import SourceError, UnsupportedModelError
from qwen_onnx.records import Verdict
from qwen_onnx.sources.adapter import Adapter
from qwen_onnx.sources.fetch import weights_digest
from qwen_onnx.sources.streamed import Stored, read_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

MODULE = re.compile(r"layers\.(?P<layer>\d{1,6})\.(?:\w+\.)?(?P<matrix>\w+)")


def convert_adapter(adapter: Adapter, artifact: Path, output: Path, genai: Path | None = None) -> AdapterRecord:
    """Write ``adapter`` as a file for the slots of ``artifact``.

    Args:
        genai: where it is written in onnxruntime-genai's form, too, for its ``Adapters``; that has no record.

    Raises:
        ArtifactError: the artifact is not whole or has no slots.
        UnsupportedModelError: the adapter was trained on other weights or against another artifact, has a larger rank
            than the slots, a matrix without a slot, or a matrix of another size.
        SourceError: there is something at ``output`` or ``genai`` already.
    """
    for file in (output, genai) if genai else (output,):
        if file.exists() or file.is_symlink():
            raise SourceError("there is a file already", where=str(file), hint="give another name")
    manifest = open_runnable(artifact).manifest
    host = host_of(artifact, manifest)
    slots, base = host.slots, Base(model=manifest.plan.model, weights=host.weights)
    _require_base(adapter, host, manifest)
    if adapter.rank > slots.rank:
        raise UnsupportedModelError(
            f"the adapter's rank is {adapter.rank}, the artifact's slots take {slots.rank}",
            where=str(adapter.folder),
            hint=f"build it with larger ones: qwen-onnx optimize {manifest.plan.asked} --adapter-rank {adapter.rank}",
        )
    tensors = _tensors(adapter, slots)
    output.parent.mkdir(parents=True, exist_ok=True)
    targets = sorted({_place(module)[1] for module in adapter.tensors})
    made = adapter.manifest
    if genai:
        _write_for_genai(genai, tensors)
    return write_adapter_file(
        output,
        tensors,
        name=adapter.name,
        base=base,
        against=made.against.graph if made and made.against else None,
        rank=adapter.rank,
        targets=targets,
        verdict=made.verdict if made else Verdict.UNVERIFIED,
        adapter=adapter.digest,
        data=made.data.sha256 if made else None,
    )


def _write_for_genai(file: Path, tensors: Mapping[str, Floats]) -> None:
    import onnxruntime as ort

    form = ort.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(1)
    form.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(tensor) for name, tensor in tensors.items()})
    form.export_adapter(str(file))


def host_of(folder: Path, manifest: Manifest) -> Host:
    """What an adapter for the artifact in ``folder`` must fit.

    Raises:
        ArtifactError: its graph has no slots.
    """
    graph = GenaiConfig.read(folder).graph_file
    slots = slots_of_graph(folder / graph)
    return Host(slots, weights_digest(manifest.source.files), graph_digest(manifest, graph))


def _require_base(adapter: Adapter, host: Host, manifest: Manifest) -> None:
    made = adapter.manifest
    if made is None:
        return
    if made.base.weights != host.weights:
        raise UnsupportedModelError(
            f"the adapter was trained on other weights, those of {made.base.model} with the digest "
            f"{made.base.weights[:12]}; {manifest.plan.name} has {host.weights[:12]}",
            where=str(adapter.folder),
            hint="give --base an artifact of the model that it was trained on",
        )
    if made.against and made.against.graph != host.graph:
        raise UnsupportedModelError(
            f"the adapter was trained against {made.against.artifact}, whose graph has the digest "
            f"{made.against.graph[:12]}; {manifest.plan.name} here has {host.graph[:12]}, and other rounding",
            where=str(adapter.folder),
            hint="give --base the artifact that it was trained against",
        )


def _place(module: str) -> tuple[int, str]:
    """Layer and matrix of a module, whose name ``open_adapter`` has checked."""
    found = MODULE.search(module)
    if found is None:
        raise UnsupportedModelError(f"{module[:200]!r} is not a matrix of a layer", hint=HINT)
    return int(found["layer"]), found["matrix"]


def _tensors(adapter: Adapter, slots: Slots) -> dict[str, Floats]:
    known: dict[tuple[int, str], Slot] = {
        (slot.layer, part.matrix): slot for slot in slots.slots for part in slot.parts
    }
    modules: dict[str, dict[str, str]] = {}
    for module in adapter.tensors:
        layer, matrix = _place(module)
        slot = known.get((layer, matrix))
        if slot is None:
            what = f"the artifact has no slot for {module[:200]}"
            raise UnsupportedModelError(what, where=str(adapter.folder), hint="give --base another artifact")
        if matrix in modules.setdefault(slot.name, {}):
            what = f"{module[:200]} and {modules[slot.name][matrix][:200]} have one slot"
            raise UnsupportedModelError(what, where=str(adapter.folder), hint=HINT)
        modules[slot.name][matrix] = module
    found: dict[str, Floats] = {}
    for slot in slots.slots:
        if slot.name in modules:
            found[slot.a], found[slot.b] = _filled(slot, modules[slot.name], adapter)
    return found


def _filled(slot: Slot, modules: Mapping[str, str], adapter: Adapter) -> tuple[Floats, Floats]:
    """A, [inputs, r], and B, [r, outputs], of a slot with one block of B for each of its modules."""
    columns, rows = [], []
    for matrix, (begin, end) in slot.places().items():
        if matrix not in modules:
            continue
        parts = adapter.tensors[modules[matrix]]
        a, b = parts["A"][1].shape, parts["B"][1].shape
        if (a[1], b[0]) != (slot.inputs, end - begin):
            raise UnsupportedModelError(
                f"the adapter's {modules[matrix][:200]} is for {[b[0], a[1]]}, the artifact's is "
                f"{[end - begin, slot.inputs]}",
                where=str(adapter.folder),
                hint="give --base an artifact of the model that it was trained on",
            )
        columns.append(_read(parts["A"]).T)
        block = np.zeros((adapter.rank, slot.outputs), np.float32)
        block[:, begin:end] = np.float32(adapter.scale) * _read(parts["B"]).T
        rows.append(block)
    made = np.ascontiguousarray(np.concatenate(columns, 1)), np.concatenate(rows)
    if not all(np.isfinite(part).all() for part in made):
        raise UnsupportedModelError("it holds NaN or infinity", where=slot.name, hint="train it again")
    return made


def _read(part: tuple[str, Stored]) -> Floats:
    name, entry = part
    values: Any = read_tensor(name, {name: entry}).float().numpy()
    return np.asarray(values, np.float32)
