"""An adapter for the slots of a graph: one safetensors file, whose header holds the adapter's record.

A stranger may have written it: nothing of it is run, and no byte is read before the header says what the slots expect.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from qwen_onnx.artifact.adapter_slots import Slot, Slots
from qwen_onnx.artifact.manifest import Manifest
from qwen_onnx.bounded import first_fault, open_plain, read_object
from qwen_onnx.catalog.training import MOST_RANK, Matrix
from qwen_onnx.errors import ArtifactError
from qwen_onnx.files import whole_file
from qwen_onnx.records import Grown, MeasuredVerdict, Name, Record, Sha256, Verdict, digest_of

Floats = npt.NDArray[np.float32]
# of the header's metadata
RECORD = "qwen_onnx.adapter"
KIND, WIDTH = "F32", 4
# bytes before the header, which say how long it is; and the most that it has
LENGTH, LARGEST_HEADER = 8, 4 << 20
ALIGNMENT = 8
# read at once; whole numbers
BLOCK = 1 << 20
HINT = "make it: qwen-onnx adapter convert FOLDER --base ARTIFACT --output FILE"
NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,59}"


class Base(Record):
    """The model that an adapter belongs to; ``weights`` is the digest of its checkpoint's weights."""

    model: str
    weights: Sha256


class AdapterDrift(Record):
    """What an artifact with the adapter drifts from PyTorch with the adapter merged.

    Attributes:
        graph: digest of the artifact's graph and weights, see ``graph_digest``.
        kld_mean: in nats per token; ``kld_upper`` its upper 95 % bound, ``kld_limit`` the artifact's own limit.
    """

    graph: Sha256
    precision: str = Field(pattern=r"^[a-z0-9]{1,16}$")
    verdict: MeasuredVerdict
    positions: int = Field(ge=1)
    kld_mean: float
    kld_upper: float
    kld_limit: float = Field(gt=0)
    top1: float = Field(ge=0, le=1)
    ppl_ratio: float = Field(ge=0)


class AdapterRecord(Grown):
    """Everything about an adapter but its numbers.

    Attributes:
        drift: of its answers by an artifact, once `adapter verify` has measured it.
        against: digest of the graph whose rounded weights it was trained on, see ``graph_digest``; it fits no other.
        verdict: of its training; UNVERIFIED where nothing tells of one.
        adapter: digest of the adapter that it was made of; ``data`` of what that learnt from, if it says so.
        content: SHA-256 of everything behind the header.
    """

    added = frozenset({"against"})

    schema_version: Literal[1] = 1
    name: Name
    base: Base
    against: Sha256 | None = None
    rank: int = Field(ge=1, le=MOST_RANK)
    targets: tuple[Matrix, ...] = Field(min_length=1, max_length=7)
    verdict: Verdict
    adapter: Sha256
    data: Sha256 | None = None
    drift: AdapterDrift | None = None
    content: Sha256


class _Entry(Record):
    """A tensor as the header has it."""

    dtype: Literal["F32"]
    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    data_offsets: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


@dataclass(frozen=True)
class Host:
    """A graph that takes adapters.

    Attributes:
        weights: digest of the weights of its checkpoint; ``graph`` its own, see ``graph_digest``.
    """

    slots: Slots
    weights: str
    graph: str


@dataclass(frozen=True)
class SlotAdapter:
    """An adapter that fits a graph.

    Attributes:
        tensors: float32 by the name of the slot's input, as ``Slot`` has them.
        digest: SHA-256 of the whole file.
    """

    record: AdapterRecord
    tensors: dict[str, Floats]
    digest: str

    @property
    def bytes(self) -> int:
        """In memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def write_adapter_file(file: Path, tensors: Mapping[str, Floats], **record: Any) -> AdapterRecord:
    """Write ``tensors``, float32 by name, in one go: the file is there whole or not at all.

    Args:
        record: the fields of ``AdapterRecord`` but ``content``.
    """
    content = hashlib.sha256()
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        content.update(np.ascontiguousarray(tensor).data)
        header[name] = {"dtype": KIND, "shape": tensor.shape, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    made = AdapterRecord.model_validate({**record, "content": content.hexdigest()})
    text = json.dumps({"__metadata__": {RECORD: made.model_dump_json()}, **header}, separators=(",", ":"))
    body = text.encode("utf-8")
    body += b" " * (-len(body) % ALIGNMENT)
    with whole_file(file) as out:
        out.write(len(body).to_bytes(LENGTH, "little") + body)
        for tensor in tensors.values():
            out.write(np.ascontiguousarray(tensor).data)
    return made


def write_drift(file: Path, adapter: SlotAdapter, drift: AdapterDrift) -> AdapterRecord:
    """Write the adapter that was read from ``file`` anew, with what it drifts."""
    told = adapter.record.model_dump(mode="json", exclude={"content", "drift"})
    return write_adapter_file(file, adapter.tensors, **told, drift=drift)


def graph_digest(manifest: Manifest, graph: str) -> str:
    """Of the checksums of an artifact's graph file and the files of its weights."""
    return digest_of({name: sum for name, sum in manifest.files.items() if name.startswith(graph)})


def read_adapter_file(file: Path, host: Host) -> SlotAdapter:
    """Read an adapter for the slots of ``host``.

    Raises:
        ArtifactError: it is missing, not a plain file or not an adapter; it belongs to other weights or was trained on
            those of another graph, has a larger rank than the slots take, or tensors for other slots; it is damaged, or
            a number is not finite.
    """
    where = str(file)
    with open_plain(file, ArtifactError, hint=HINT) as opened:
        begin, body, size = _read_header(opened, where)
        record, entries = _parsed(body, where)
        _check_base(record, host, where)
        _check_fit(entries, host.slots, record.rank, where)
        _check_layout(entries, size, where)
        content = opened.read(size)
    if hashlib.sha256(content).hexdigest() != record.content:
        raise _altered(file)
    tensors = {}
    for name, entry in entries.items():
        first, last = entry.data_offsets
        tensors[name] = np.frombuffer(content, "<f4", (last - first) // WIDTH, first).reshape(entry.shape)
        if not np.isfinite(tensors[name]).all():
            raise ArtifactError(f"{name} holds NaN or infinity", where=where, hint="train it again")
    digest = hashlib.sha256(begin + body)
    digest.update(content)
    return SlotAdapter(record, tensors, digest.hexdigest())


def check_adapter_file(file: Path) -> AdapterRecord:
    """The record of an adapter whose file is whole; whether it fits an artifact is not known.

    Raises:
        ArtifactError: it is missing, not a plain file or not an adapter; it is damaged, or a number is not finite.
    """
    where = str(file)
    with open_plain(file, ArtifactError, hint=HINT) as opened:
        _, body, size = _read_header(opened, where)
        record, entries = _parsed(body, where)
        _check_layout(entries, size, where)
        content, finite = hashlib.sha256(), True
        while block := opened.read(BLOCK):
            content.update(block)
            finite = finite and bool(np.isfinite(np.frombuffer(block, "<f4", len(block) // WIDTH)).all())
    if content.hexdigest() != record.content:
        raise _altered(file)
    if not finite:
        raise ArtifactError(f"{file.name} holds NaN or infinity", where=where, hint="train it again")
    return record


def names_in_file(file: Path) -> set[str]:
    """Names of the tensors that an adapter says it has; see ``check_adapter_file``."""
    with open_plain(file, ArtifactError, hint=HINT) as opened:
        return set(_parsed(_read_header(opened, str(file))[1], str(file))[1])


def _altered(file: Path) -> ArtifactError:
    return ArtifactError(f"{file.name} is truncated or altered", where=str(file), hint=HINT)


def _read_header(opened: BufferedReader, where: str) -> tuple[bytes, bytes, int]:
    """The length of the header as it stands, the header, and how many bytes follow."""
    size = os.fstat(opened.fileno()).st_size
    begin = opened.read(LENGTH)
    length = int.from_bytes(begin, "little")
    if len(begin) < LENGTH or not 2 <= length <= min(LARGEST_HEADER, size - LENGTH):
        raise ArtifactError(f"{Path(where).name} is not an adapter in safetensors form", where=where, hint=HINT)
    return begin, opened.read(length), size - LENGTH - length


def _parsed(body: bytes, where: str) -> tuple[AdapterRecord, dict[str, _Entry]]:
    header = read_object(
        body, most_bytes=LARGEST_HEADER, error=ArtifactError, what=f"the header of {Path(where).name}", hint=HINT
    )
    metadata = header.pop("__metadata__", None)
    told = metadata.get(RECORD) if isinstance(metadata, dict) else None
    if not isinstance(told, str):
        raise ArtifactError(
            "it does not say what it was made for: not an adapter of `qwen-onnx adapter convert`",
            where=where,
            hint=HINT,
        )
    # its strings may hold what the header's JSON only escapes
    read_object(
        told.encode("utf-8"),
        most_bytes=LARGEST_HEADER,
        error=ArtifactError,
        what=f"the record in {Path(where).name}",
        hint=HINT,
    )
    try:
        record = AdapterRecord.model_validate_json(told)
        return record, {name: _Entry.model_validate_json(json.dumps(entry)) for name, entry in header.items()}
    except ValidationError as error:
        raise ArtifactError(f"its header is damaged: {first_fault(error)}", where=where, hint=HINT) from error


def _check_base(record: AdapterRecord, host: Host, where: str) -> None:
    if record.base.weights != host.weights:
        raise ArtifactError(
            f"it belongs to other weights, those of {record.base.model[:80]} with the digest "
            f"{record.base.weights[:12]}; the artifact's are {host.weights[:12]}",
            where=where,
            hint=HINT,
        )
    if record.against not in (None, host.graph):
        raise ArtifactError(
            f"it was trained against another artifact, whose graph has the digest {str(record.against)[:12]}; "
            f"this one's has {host.graph[:12]}, and other rounding",
            where=where,
            hint="serve it with that artifact, or train it again: qwen-onnx finetune MODEL --against ARTIFACT",
        )
    if record.rank > host.slots.rank:
        raise ArtifactError(
            f"its rank is {record.rank}, the artifact's slots take {host.slots.rank}",
            where=where,
            hint=f"build the artifact with larger ones: qwen-onnx optimize MODEL --adapter-rank {record.rank}",
        )
    if record.verdict not in (Verdict.PASS, Verdict.UNVERIFIED):
        raise ArtifactError(f"its training ended with {record.verdict}", where=where, hint="train it again")
    drift = record.drift
    if drift and drift.verdict is not Verdict.PASS:
        raise ArtifactError(
            f"its answers in {drift.precision} drift too far: {drift.verdict}, mean KLD {drift.kld_mean:.3g}, at most "
            f"{drift.kld_upper:.3g}, where {drift.kld_limit:.3g} is allowed",
            where=where,
            hint="take an artifact of higher precision and convert it again: qwen-onnx adapter convert",
        )


def _check_fit(entries: Mapping[str, _Entry], slots: Slots, rank: int, where: str) -> None:
    """Every tensor is A or B of a slot, in its size, and neither comes alone."""
    unknown = sorted(entries.keys() - {name for slot in slots.slots for name in (slot.a, slot.b)})
    if unknown:
        raise ArtifactError(f"{unknown[0][:200]!r} is no slot of this artifact", where=where, hint=HINT)
    if not entries:
        raise ArtifactError("it holds no weights", where=where, hint=HINT)
    for slot in slots.slots:
        a, b = entries.get(slot.a), entries.get(slot.b)
        if a is None and b is None:
            continue
        if a is None or b is None:
            raise ArtifactError(f"{slot.name} has A or B alone", where=where, hint=HINT)
        if not _fits(slot, a.shape, b.shape, rank):
            raise ArtifactError(
                f"{slot.name} has A {list(a.shape)} and B {list(b.shape)}, its slot takes [{slot.inputs}, r] and "
                f"[r, {slot.outputs}]",
                where=where,
                hint=HINT,
            )


def _fits(slot: Slot, a: tuple[int, int], b: tuple[int, int], rank: int) -> bool:
    columns = a[1]
    known = columns % rank == 0 and columns <= rank * len(slot.parts)
    return known and a[0] == slot.inputs and b == (columns, slot.outputs)


def _check_layout(entries: Mapping[str, _Entry], size: int, where: str) -> None:
    """The tensors lie one behind the other, and nothing else is there."""
    end = 0
    for name, entry in entries.items():
        rows, columns = entry.shape
        if entry.data_offsets != (end, end + rows * columns * WIDTH):
            raise ArtifactError(f"{name[:200]} does not lie where its shape says", where=where, hint=HINT)
        end = entry.data_offsets[1]
    if end != size:
        raise ArtifactError(f"it has {size:,} bytes of weights, its header says {end:,}", where=where, hint=HINT)
