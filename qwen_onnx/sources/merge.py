"""A checkpoint with an adapter merged into it: W + scale · B @ A in fp32, a tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwen_onnx.errors import UnsupportedModelError
from qwen_onnx.sources.adapter import Adapter
from qwen_onnx.sources.checkpoint import shards
from qwen_onnx.sources.streamed import BYTES, Stored, read_tensor, tensors_of, write_anew

if TYPE_CHECKING:
    import torch

HINT = "give --adapter one that was trained on this model"


def write_merged(checkpoint: Path, adapter: Adapter, folder: Path) -> None:
    """Write ``checkpoint`` to ``folder`` with every matrix of ``adapter`` merged; those are float32, the rest as it is.

    Raises:
        UnsupportedModelError: the checkpoint lacks a matrix, has it in another shape, or the sum is not finite.
    """
    found = tensors_of(shards(checkpoint))
    modules = {_weight_of(module, found): module for module in adapter.tensors}
    for name, module in modules.items():
        _require_fit(name, found[name], adapter, module)
    kinds = {name: "F32" if name in modules else entry.kind for name, entry in found.items()}

    def tensor(name: str) -> torch.Tensor:
        weight = read_tensor(name, found)
        return _merged(weight, adapter, modules[name]) if name in modules else weight

    # whoever loads it whole shall not round what was merged
    write_anew(checkpoint, folder, kinds, tensor, _in_float32)


def _in_float32(config: dict[str, object]) -> dict[str, object]:
    told = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": "float32"}
    text = told.get("text_config")
    return told | ({"text_config": _in_float32(text)} if isinstance(text, dict) else {})


def _weight_of(module: str, found: dict[str, Stored]) -> str:
    """The tensor of ``module``; a multimodal checkpoint has a longer prefix than the model of its text."""
    tail = f".{module[module.index('layers.') :]}.weight"
    names = [name for name in found if f".{name}".endswith(tail)]
    if len(names) != 1:
        raise UnsupportedModelError(
            f"the checkpoint has {len(names)} matrices for the adapter's {module}", where=module, hint=HINT
        )
    return names[0]


def _require_fit(name: str, entry: Stored, adapter: Adapter, module: str) -> None:
    a, b = adapter.tensors[module]["A"][1], adapter.tensors[module]["B"][1]
    learnt = (b.shape[0], a.shape[1])
    if entry.kind not in BYTES or entry.kind == "F8_E4M3" or entry.shape != learnt:
        raise UnsupportedModelError(
            f"the checkpoint's {name} is {entry.kind} {list(entry.shape)}, the adapter is for {list(learnt)}",
            where=str(adapter.folder),
            hint=HINT,
        )


def _merged(weight: torch.Tensor, adapter: Adapter, module: str) -> torch.Tensor:
    import torch

    parts = {}
    for side, (name, entry) in adapter.tensors[module].items():
        parts[side] = read_tensor(name, {name: entry}).float()
    made = weight.float() + adapter.scale * (parts["B"] @ parts["A"])
    if not bool(torch.isfinite(made).all()):
        raise UnsupportedModelError("the merged weights hold NaN or infinity", where=module, hint="train it again")
    return made
