"""Slots of a graph for LoRA adapters: beside a matrix, two inputs A and B that are empty until an adapter fills them.

The graph says in its metadata which slots it has. A matrix may hold several modules of the checkpoint, one after the
other: q, k and v of a layer are one in most graphs, and have one slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationError

from qwen_onnx.bounded import first_fault, read_json
from qwen_onnx.catalog.training import MOST_RANK, Matrix
from qwen_onnx.errors import ArtifactError
from qwen_onnx.records import Record

# key of the graph's metadata
METADATA = "qwen_onnx.adapter_slots"
# a layer's slot takes less than 400 characters
MOST_BYTES = 1 << 20
HINT = "build it with slots: qwen-onnx optimize MODEL --adapter-rank 16"
Size = Annotated[int, Field(ge=1, le=1 << 24)]


class Part(Record):
    """One module of the checkpoint in a slot's matrix, with as many outputs."""

    matrix: Matrix
    outputs: Size


class Slot(Record):
    """A pair of inputs: A, float32 [inputs, r], and B, float32 [r, outputs]; r is 0 where nobody fills them.

    Attributes:
        name: of the matrix, as the graph's weights have it.
        parts: in the order of their outputs.
    """

    layer: int = Field(ge=0, lt=1 << 16)
    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_.]{1,120}$")]
    inputs: Size
    parts: tuple[Part, ...] = Field(min_length=1, max_length=3)

    @property
    def a(self) -> str:
        """Name of the input A."""
        return f"{self.name}.lora_A.weight"

    @property
    def b(self) -> str:
        """Name of the input B."""
        return f"{self.name}.lora_B.weight"

    @property
    def outputs(self) -> int:
        """Of the whole matrix."""
        return sum(part.outputs for part in self.parts)

    def places(self) -> dict[Matrix, tuple[int, int]]:
        """Where the outputs of each module begin and end."""
        found: dict[Matrix, tuple[int, int]] = {}
        begin = 0
        for part in self.parts:
            found[part.matrix] = (begin, begin + part.outputs)
            begin += part.outputs
        return found


class Slots(Record):
    """All slots of a graph, for adapters of at most ``rank``."""

    schema_version: Literal[1] = 1
    rank: int = Field(ge=1, le=MOST_RANK)
    slots: tuple[Slot, ...] = Field(min_length=1)


def read_slots(metadata: Mapping[str, str], where: str) -> Slots:
    """The slots that a graph's metadata tells of.

    Raises:
        ArtifactError: it tells of none, or what it tells is damaged.
    """
    text = metadata.get(METADATA)
    if text is None:
        raise ArtifactError("the graph has no slots for adapters", where=where, hint=HINT)
    body = text.encode("utf-8")
    read_json(body, most_bytes=MOST_BYTES, error=ArtifactError, what="the list of slots", hint=HINT)
    try:
        return Slots.model_validate_json(body)
    except ValidationError as error:
        raise ArtifactError(f"the list of slots is damaged: {first_fault(error)}", where=where, hint=HINT) from error


def slots_of_graph(file: Path) -> Slots:
    """The slots of the graph in ``file``, whose weights are not read.

    Raises:
        ArtifactError: it is not a graph, or see ``read_slots``.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(file), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ArtifactError(f"the graph cannot be read: {error}", where=str(file), hint=HINT) from error
    return read_slots({item.key: item.value for item in model.metadata_props}, str(file))
