"""A mixture of experts for genai's builder as views of the mapped checkpoint.

``from_pretrained`` of transformers 5 stacks every layer's experts in anonymous memory: most of a checkpoint. Here the
model is made on the meta device, its other weights are views of the mapped shards, and its experts stay where they are
until the builder comes to their layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qwen_onnx.errors import ExportError
from qwen_onnx.export.weights import CheckpointWeights

STACKED = ("gate_up_proj", "down_proj")
# the text export reads nothing of it
UNUSED = "model.visual."


class StoredExperts:
    """The experts of one layer, read one at a time.

    A checkpoint has either three matrices per expert or, as Qwen3.5 is published, two tensors of all experts.

    Args:
        weights: the checkpoint.
        prefix: name of the module of the experts.
        count: number of experts.
        dtype: type that transformers would give them; None keeps the stored one.
    """

    def __init__(self, weights: CheckpointWeights, prefix: str, count: int, dtype: torch.dtype | None) -> None:
        self.weights, self.prefix, self.count, self.dtype = weights, prefix, count, dtype

    def matrices(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Per expert: rows of gate and up in turns [2 · inner, hidden], as fused SwiGLU has them; down [hidden, inner].

        Raises:
            ExportError: the checkpoint lacks one.
        """
        if f"{self.prefix}.{STACKED[0]}" in self.weights:
            stacked = self.weights.tensors(f"{self.prefix}.{name}" for name in STACKED)
            both, downs = stacked.values()
            for index in range(self.count):
                gate, up = both[index].chunk(2)
                yield self._pair(gate, up, downs[index])
            return
        parts = [
            [f"{self.prefix}.{index}.{name}_proj.weight" for name in ("gate", "up", "down")]
            for index in range(self.count)
        ]
        found = self.weights.tensors(name for names in parts for name in names)
        for names in parts:
            gate, up, down = (found.pop(name) for name in names)
            yield self._pair(gate, up, down)

    def _pair(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.stack([gate, up], dim=1).flatten(0, 1)
        return both.to(self.dtype or both.dtype), down.to(self.dtype or down.dtype)


def mapped_model(checkpoint: Path) -> Any:
    """The transformers model of ``checkpoint``, its weights views of the mapped files.

    Each module of experts has no weights but the attribute ``stored``, a ``StoredExperts``.

    Raises:
        ExportError: the checkpoint lacks a weight of its architecture.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    weights = CheckpointWeights(checkpoint)
    prefixes = []
    for prefix, module in model.named_modules():
        own = {name for name, _ in module.named_parameters(recurse=False)}
        if own.issuperset(STACKED):
            module.stored = StoredExperts(weights, prefix, len(module.gate_up_proj), config.dtype)
            prefixes.append(f"{prefix}.")
    tied = model.all_tied_weights_keys
    wanted = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in tied and not name.startswith((*prefixes, UNUSED))
    ]
    _require_shapes(model, found := weights.tensors(wanted), checkpoint)
    # the type is that of the config, as from_pretrained does it
    found = {name: tensor.to(config.dtype or tensor.dtype) for name, tensor in found.items()}
    model.load_state_dict(found, strict=False, assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _require_shapes(model: Any, found: dict[str, torch.Tensor], checkpoint: Path) -> None:
    for name, tensor in found.items():
        wanted = model.get_parameter(name).shape
        if tensor.shape != wanted:
            raise ExportError(
                f"{name} is {list(tensor.shape)}, its architecture has {list(wanted)}",
                where=str(checkpoint),
                hint="use a checkpoint that transformers saved for this architecture",
            )
