"""A model whose weights are not all plain matrices, for genai's builder, as views of the mapped checkpoint.

``from_pretrained`` of transformers 5 stacks every layer's experts in anonymous memory: most of a checkpoint. Here the
model is made on the meta device, its other weights are views of the mapped shards, and its experts stay where they are
until the builder comes to their layer. Codes of a quantised checkpoint stand in the place of its matrices, in the form
in which genai's own reader hands over those of dense models; it does not know linear attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qwen_onnx.errors import ExportError
from qwen_onnx.export.experts import CODED, StoredExperts, are_experts
from qwen_onnx.export.weights import CheckpointWeights
from qwen_onnx.sources.checkpoint import plain_name

# the text export reads nothing of it
UNUSED = "model.visual."


class CodedLinear(torch.nn.Module):
    """Stands in a model for a ``torch.nn.Linear`` that a pass quantised: what genai's builder looks for in one.

    Args:
        codes, scales, zeros: uint8 [outputs, bytes], [outputs, blocks], uint8 [outputs, bytes], mapped; no zeros: all
            are the middle of the grid.
        inputs: columns of the matrix.
        bias: of the linear module; may be on the meta device.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        inputs: int,
        bias: torch.nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, len(codes)
        self.bits, self.group_size = 8 * codes.shape[1] // inputs, inputs // scales.shape[1]
        self.qweight, self.scales, self.qzeros = codes.reshape(*scales.shape, -1), scales, zeros
        self.g_idx = None
        self.bias = bias

    def picked(self, rows: torch.Tensor) -> CodedLinear:
        """Some of its outputs, in another order."""
        zeros = None if self.qzeros is None else self.qzeros[rows]
        return CodedLinear(self.qweight.flatten(1)[rows], self.scales[rows], zeros, self.in_features)


def mapped_model(checkpoint: Path) -> Any:
    """The transformers model of ``checkpoint``, its weights views of the mapped files.

    Each module of experts has no weights but the attribute ``stored``, a ``StoredExperts``.

    Raises:
        ExportError: the checkpoint lacks a weight of its architecture, or says that it is quantised and is not.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    weights = CheckpointWeights(checkpoint, plain=True)
    quantized = _put_codes(model, weights)
    prefixes = []
    for prefix, module in model.named_modules():
        if are_experts(module):
            module.stored = StoredExperts(weights, plain_name(prefix), module.gate_up_proj.shape, config.dtype)
            prefixes.append(f"{prefix}.")
            quantized |= module.stored.quantized
    if hasattr(config, "quantization_config") and not quantized:
        raise ExportError(
            "config.json says that the checkpoint is quantised, but it has no codes that this exporter reads",
            where=str(checkpoint),
            hint="build from the checkpoint in float",
        )
    tied = model.all_tied_weights_keys
    wanted = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in tied and not name.startswith((*prefixes, UNUSED))
    ]
    stored = weights.tensors(map(plain_name, wanted))
    found = {name: stored[plain_name(name)] for name in wanted}
    _require_shapes(model, found, checkpoint)
    # the type is that of the config, as from_pretrained does it
    found = {name: tensor.to(config.dtype or tensor.dtype) for name, tensor in found.items()}
    model.load_state_dict(found, strict=False, assign=True)
    if not isinstance(model.lm_head, CodedLinear):
        model.tie_weights()
    return model.eval().requires_grad_(False)


def _put_codes(model: Any, weights: CheckpointWeights) -> bool:
    """Replace the linear modules that the checkpoint has codes of; whether there are any."""
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and f"{plain_name(name)}.{CODED[0]}" in weights
    }
    for name, module in linears.items():
        codes, scales, zeros = (f"{plain_name(name)}.{part}" for part in CODED)
        found = weights.tensors(part for part in (codes, scales, zeros) if part in weights)
        parent, _, own = name.rpartition(".")
        coded = CodedLinear(found[codes], found[scales], found.get(zeros), module.in_features, module.bias)
        setattr(model.get_submodule(parent), own, coded)
    return bool(linears)


def _require_shapes(model: Any, found: dict[str, torch.Tensor], checkpoint: Path) -> None:
    for name, tensor in found.items():
        wanted = model.get_parameter(name).shape
        if tensor.shape != wanted:
            raise ExportError(
                f"{name} is {list(tensor.shape)}, its architecture has {list(wanted)}",
                where=str(checkpoint),
                hint="use a checkpoint that transformers saved for this architecture",
            )
