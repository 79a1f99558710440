"""The experts of a mixture in a checkpoint, read one at a time: in float or as codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from qwen_onnx.errors import ExportError
from qwen_onnx.export.weights import CheckpointWeights, Scratch

# parameters of a module of experts in transformers: [experts, 2 · inner, hidden], [experts, hidden, inner]
STACKED = ("gate_up_proj", "down_proj")
# of a matrix that a pass quantised
CODED = ("qweight", "scales", "qzeros")
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def are_experts(module: torch.nn.Module) -> bool:
    """Whether a module is what transformers makes of the experts of a layer."""
    return {name for name, _ in module.named_parameters(recurse=False)}.issuperset(STACKED)


class StoredExperts:
    """The experts of one layer, read one at a time.

    A checkpoint has either three matrices per expert or, as Qwen3.5 is published, two tensors of all experts; codes
    always come in tensors of all experts.

    Args:
        weights: the checkpoint.
        prefix: name of the module of the experts.
        shape: of gate and up of all of them, [experts, 2 · inner, hidden].
        dtype: type that transformers would give them; None keeps the stored one.
    """

    def __init__(
        self, weights: CheckpointWeights, prefix: str, shape: Sequence[int], dtype: torch.dtype | None = None
    ) -> None:
        self.weights, self.prefix, self.dtype = weights, prefix, dtype
        self.count, both, self.hidden = shape
        self.inner = both // 2

    @property
    def quantized(self) -> bool:
        """Whether the checkpoint has codes of them."""
        return f"{self.prefix}.{STACKED[0]}.{CODED[0]}" in self.weights

    @property
    def stacked(self) -> bool:
        """Whether the checkpoint has two tensors of all experts."""
        return f"{self.prefix}.{STACKED[0]}" in self.weights

    def names(self) -> list[tuple[str, str, str]]:
        """Names of gate, up and down of each expert where these are stored one by one."""
        each = [f"{self.prefix}.{index}" for index in range(self.count)]
        return [(f"{name}.gate_proj.weight", f"{name}.up_proj.weight", f"{name}.down_proj.weight") for name in each]

    def parts(self) -> Iterator[Triple]:
        """Gate and up [inner, hidden] and down [hidden, inner] of each expert, as they are stored.

        Raises:
            ExportError: the checkpoint lacks one, or has it in another shape.
        """
        for gate, up, down in self._stored():
            for part in (gate, up):
                self._require(part, (self.inner, self.hidden))
            self._require(down, (self.hidden, self.inner))
            yield gate, up, down

    def _stored(self) -> Iterator[Triple]:
        if self.stacked:
            both, downs = self.weights.tensors(f"{self.prefix}.{name}" for name in STACKED).values()
            for index in range(self.count):
                gate, up = both[index].chunk(2)
                yield gate, up, downs[index]
            return
        found = self.weights.tensors(name for names in self.names() for name in names)
        for names in self.names():
            gate, up, down = (found.pop(name) for name in names)
            yield gate, up, down

    def _require(self, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        if tensor.shape != shape:
            raise ExportError(
                f"experts are {list(tensor.shape)}, their architecture has {list(shape)}",
                where=f"{self.weights.folder}: {self.prefix}",
                hint="use a checkpoint that transformers saved for this architecture",
            )

    def matrices(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Per expert: rows of gate and up in turns [2 · inner, hidden], as fused SwiGLU has them; down [hidden, inner].

        Raises:
            ExportError: the checkpoint lacks one.
        """
        for gate, up, down in self.parts():
            both = torch.stack([gate, up], dim=1).flatten(0, 1)
            yield both.to(self.dtype or both.dtype), down.to(self.dtype or down.dtype)

    def codes(self) -> Iterator[tuple[Triple, Triple]]:
        """Per expert ``CODED`` of both matrices [rows, ...], those of gate and up in turns.

        Raises:
            ExportError: the checkpoint lacks one.
        """
        names = [[f"{self.prefix}.{name}.{part}" for part in CODED] for name in STACKED]
        found = self.weights.tensors(name for group in names for name in group)
        for index in range(self.count):
            both, down = ([found[name][index] for name in group] for group in names)
            codes, scales, zeros = (torch.stack(part.chunk(2), dim=1).flatten(0, 1) for part in both)
            yield (codes, scales, zeros), (down[0], down[1], down[2])

    def copied(self, scratch: Scratch, place: str) -> dict[str, torch.Tensor]:
        """``STACKED`` in float32, in files of ``scratch`` whose names begin with ``place``."""
        files: list[torch.Tensor] = []
        for index, (gate, up, down) in enumerate(self.parts()):
            inner, hidden = gate.shape
            if not files:
                shapes = ((self.count, 2 * inner, hidden), (self.count, hidden, inner))
                files = [scratch.empty(f"{place}.{name}", shape) for name, shape in zip(STACKED, shapes, strict=True)]
            files[0][index, :inner], files[0][index, inner:], files[1][index] = gate, up, down
        return dict(zip(STACKED, files, strict=True))


def zero_points_of(codes: str) -> str:
    """What the graph calls the zero points of experts, by what it calls their codes."""
    return codes.replace(".qweight", ".zero_points")
