"""The checkpoint in PyTorch, whose weights become float32 a few rows at a time: what an artifact is measured against.

The modules, masks and rotary positions are those of transformers; only where the weights come from is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qwen_onnx.errors import VerificationError
from qwen_onnx.export.experts import STACKED
from qwen_onnx.export.skeleton import COMPUTED, EMBEDDING, HEAD, Skeleton
from qwen_onnx.export.weights import Scratch
from qwen_onnx.records import digest_of
from qwen_onnx.sources.checkpoint import read_json
from qwen_onnx.verify.dequantized import Dequantized
from qwen_onnx.verify.graph import Graph
from qwen_onnx.verify.matrices import (
    ExpertMatrices,
    Matrix,
    Stored,
    StreamedLinear,
    rounded,
    worst_row,
)

SHAPES = "stacked_shapes"  # attribute of a module of experts


class Teacher(Skeleton):
    """A checkpoint whose weights become float32 while they are used.

    Args:
        checkpoint: Hugging Face folder.
        threads: of PyTorch.

    Raises:
        VerificationError: transformers does not know the model.
        ExportError: the checkpoint lacks a shard or a weight.
    """

    def __init__(self, checkpoint: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            # nothing is put there: weights are converted where they are used
            super().__init__(checkpoint, Scratch(checkpoint))
        except (OSError, ValueError, KeyError) as error:
            raise VerificationError(f"PyTorch cannot load the checkpoint: {error}", where=str(checkpoint)) from error
        self.number = self.tables = torch.float32
        self.replaced_by = ""
        self.replaced: Mapping[str, Matrix] = {}
        self.replaced_experts: Mapping[str, ExpertMatrices] = {}
        self._errors: dict[str, float] | None = None
        for layer in self.model.model.layers:
            _stream(layer)

    def replace(self, matrices: Mapping[str, Matrix], experts: Mapping[str, ExpertMatrices], identity: str) -> None:
        """Take these instead of the checkpoint's, by name of the parameter; ``identity`` tells them from others."""
        self.replaced, self.replaced_experts, self.replaced_by = matrices, experts, identity

    @torch.inference_mode()
    def errors(self) -> dict[str, float]:
        """By name of a replaced matrix, how far its worst row is from the checkpoint's: see ``worst_row``."""
        found = self._errors = {}
        for index in range(self.count):
            with self.layer(index):
                pass
        self._errors = None
        own = EMBEDDING if self.config.tie_word_embeddings or HEAD not in self.weights else HEAD
        for name, mine in ((EMBEDDING, EMBEDDING), (HEAD, own)):
            if name in self.replaced:
                stored = Stored(self.weights.tensor(mine), self.number)
                found[name] = worst_row(self.replaced[name], stored)
        return found

    @property
    def layers(self) -> list[dict[str, torch.nn.Module]]:
        """The modules of each layer by name."""
        return [dict(layer.named_modules()) for layer in self.model.model.layers]

    def fingerprint(self) -> str:
        """What tells this checkpoint from others at no cost."""
        settings = read_json(self.weights.folder / "config.json")
        kinds = [str(self.number), str(self.tables)]
        return digest_of([settings, self.weights.fingerprint(), *kinds, self.replaced_by])

    def matrix(self, name: str, tensor: torch.Tensor | None = None) -> Matrix:
        """The matrix ``name``, which ``replaced`` may have instead of the checkpoint."""
        if name in self.replaced:
            return self.replaced[name]
        return Stored(self.weights.tensor(name) if tensor is None else tensor, self.number)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """See ``Skeleton``."""
        return self.matrix(EMBEDDING).rows(ids.flatten()).view(*ids.shape, -1)

    def head(self) -> Matrix:
        """What the logits are made with."""
        if HEAD in self.replaced:
            return self.replaced[HEAD]
        return self.matrix(EMBEDDING if self.config.tie_word_embeddings or HEAD not in self.weights else HEAD)

    def arguments(self, hidden: torch.Tensor) -> list[dict[str, Any]]:
        """See ``Skeleton``; tables of rotary positions in the type that the graph gives them."""
        found = super().arguments(hidden)
        for arguments in found:
            tables = arguments["position_embeddings"]
            arguments["position_embeddings"] = tuple(rounded(table, self.tables) for table in tables)
        return found

    def _empty(self, module: torch.nn.Module) -> None:
        """See ``Skeleton``."""
        for part in module.modules():
            if isinstance(part, StreamedLinear):
                part.matrix = part.bias = None
            for name in getattr(part, SHAPES, {}):
                setattr(part, name, None)
        super()._empty(module)

    def _fill(self, module: torch.nn.Module, prefix: str) -> None:
        place = f"{prefix}."
        names = [name for name in self.weights.names(place) if not name.endswith(COMPUTED)]
        stored = {name.removeprefix(place): tensor for name, tensor in self.weights.tensors(names).items()}
        lacking: list[str] = []
        for path, part in module.named_modules():
            self._fill_part(part, f"{path}." if path else "", prefix, stored, lacking)
        faults = [f"lacks {name}" for name in lacking[:3]] + [f"has {name}" for name in sorted(stored)[:3]]
        if faults:
            raise VerificationError(
                f"the weights do not fit the architecture: the checkpoint {', '.join(faults)}",
                where=f"{self.weights.folder}: {prefix}",
                hint="use a checkpoint that transformers saved for this architecture",
            )

    def _fill_part(
        self, part: torch.nn.Module, path: str, prefix: str, stored: dict[str, torch.Tensor], lacking: list[str]
    ) -> None:
        """Give one module its own parameters out of ``stored``; what is used is removed there."""

        def taken(name: str, shape: Sequence[int]) -> torch.Tensor | None:
            found = stored.get(name)
            if found is None or found.shape != torch.Size(shape):
                lacking.append(name if found is None else f"{name} of the shape {list(shape)}")
                return None
            return stored.pop(name)

        if isinstance(part, StreamedLinear):
            weight = taken(f"{path}weight", part.shape)
            bias = taken(f"{path}bias", part.shape[:1]) if part.has_bias else None
            name = f"{prefix}.{path}weight"
            part.matrix = None if weight is None else self.matrix(name, weight)
            part.bias = None if bias is None else rounded(bias, self.number)
            if weight is not None and part.matrix is not None and self._errors is not None and name in self.replaced:
                self._errors[name] = worst_row(part.matrix, Stored(weight, self.number))
            return
        for name, shape in getattr(part, SHAPES, {}).items():
            full = f"{prefix}.{path}{name}"
            found = self._experts(f"{path}{name}", shape, stored, lacking)
            used = self.replaced_experts.get(full, found)
            setattr(part, name, used)
            if found is not None and used is not None and used is not found and self._errors is not None:
                self._errors[full] = max(
                    worst_row(Stored(used[index]), Stored(found[index])) for index in range(len(found))
                )
        for name, value in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            tensor = taken(f"{path}{name}", value.shape)
            if tensor is not None:
                filled = rounded(tensor, self.number)
                setattr(part, name, torch.nn.Parameter(filled, requires_grad=False))

    def _experts(
        self, name: str, shape: Sequence[int], stored: dict[str, torch.Tensor], lacking: list[str]
    ) -> ExpertMatrices | None:
        """The experts' matrices of one kind, which a checkpoint has stacked or one by one."""
        count, outputs, inputs = shape
        whole = stored.get(name)
        if whole is not None and whole.shape == torch.Size(shape):
            del stored[name]
            return ExpertMatrices([[Stored(whole[index], self.number)] for index in range(count)])
        parent, _, kind = name.rpartition(".")
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
        wanted = [[f"{parent}.{index}.{part}.weight" for part in parts] for index in range(count)]
        size = torch.Size((outputs // len(parts), inputs))
        missing = [item for names in wanted for item in names if item not in stored or stored[item].shape != size]
        if missing:
            lacking.extend(missing)
            return None
        return ExpertMatrices([[Stored(stored.pop(item), self.number) for item in names] for names in wanted])


def _stream(layer: torch.nn.Module) -> None:
    """Take the weights of linear modules and of stacked experts out of a layer on the meta device."""
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, StreamedLinear(child))
        stacked = {name: tensor.shape for name in STACKED if (tensor := parent._parameters.get(name)) is not None}
        if len(stacked) == len(STACKED):
            setattr(parent, SHAPES, stacked)
            for name in STACKED:
                del parent._parameters[name]


def student_of(checkpoint: Path, graph: Graph, threads: int) -> Teacher:
    """The checkpoint with the matrices that a graph has quantised, its floats rounded to the graph's type.

    Raises:
        VerificationError: the graph has matrices that the architecture has not.
    """
    student = Teacher(checkpoint, threads)
    student.number = torch.float16 if graph.half else torch.float32
    student.tables = torch.float16 if graph.half_tables else torch.float32
    found = Dequantized(graph, student.layers, student.config)
    files = sorted(path for path in graph.file.parent.iterdir() if path.name.startswith(graph.file.name))
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    student.replace(found.matrices, found.experts, digest_of(stats))
    return student
