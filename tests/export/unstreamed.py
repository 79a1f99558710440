"""The quantiser with the whole model in memory, as the product had it first: what streaming is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qwen_onnx.export.calibration import calibration_ids
from qwen_onnx.export.passes.gptq.options import CalibratedGptqOptions
from qwen_onnx.export.passes.gptq.solver import gptq, round_to_nearest

LEADER = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
FUSED = {"k_proj": "q_proj", "v_proj": "q_proj"}
BATCH = 4


def quantized_tensors(checkpoint: Path, config: CalibratedGptqOptions) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Every tensor of the quantised checkpoint, and the names of the matrices of the body with 8 bits."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(config.seed)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.config.use_cache = False
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    ids = torch.tensor(calibration_ids(tokenizer, config.windows, config.window, config.seed))
    precise = _choose_int8(model, ids[: config.sensitivity_windows], config)
    matrices = _quantize_layers(model, ids, precise, config)
    head = model.get_output_embeddings().weight.detach()
    matrices["lm_head"] = round_to_nearest(head, config.head_bits, config.group_size)
    replaced = {f"{name}.weight" for name in matrices}
    tensors = {name: value for name, value in model.state_dict().items() if name not in replaced}
    for name, matrix in matrices.items():
        tensors |= {f"{name}.{part}": value for part, value in matrix.packed().items()}
    return tensors, precise


def _linears(model: Any) -> dict[str, torch.nn.Linear]:
    named = model.model.layers.named_modules()
    return {f"model.layers.{name}": module for name, module in named if isinstance(module, torch.nn.Linear)}


def _as(name: str, table: dict[str, str]) -> str:
    parent, _, last = name.rpartition(".")
    return f"{parent}.{table.get(last, last)}"


def _choose_int8(model: Any, ids: torch.Tensor, config: CalibratedGptqOptions) -> set[str]:
    linears = _linears(model)
    model.requires_grad_(False)
    weights = [module.weight.requires_grad_(True) for module in linears.values()]
    fisher = [torch.zeros_like(weight) for weight in weights]
    for window in ids:
        logits = model(window[None]).logits[0]
        sampled = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, sampled, reduction="sum")
        gradients = torch.autograd.grad(loss, weights)
        fisher = [total + gradient**2 for total, gradient in zip(fisher, gradients, strict=True)]
    model.requires_grad_(False)
    units: dict[str, tuple[float, int, set[str]]] = {}
    for (name, module), information in zip(linears.items(), fisher, strict=True):
        weight = module.weight.detach()
        delta = round_to_nearest(weight, config.bits, config.group_size).dequantize() - weight
        gain, size, members = units.get(_as(name, FUSED), (0.0, 0, set()))
        more = float((information * delta**2).sum())
        units[_as(name, FUSED)] = (gain + more, size + weight.numel(), members | {name})
    budget = config.int8_share * sum(size for _, size, _ in units.values())
    chosen: set[str] = set()
    for _, size, members in sorted(units.values(), key=lambda unit: unit[0] / unit[1], reverse=True):
        if size <= budget:
            budget -= size
            chosen |= members
    return chosen


@torch.no_grad()
def _quantize_layers(model: Any, ids: torch.Tensor, precise: set[str], config: CalibratedGptqOptions) -> dict[str, Any]:
    batches = torch.split(ids, min(BATCH, len(ids)))[: max(len(ids) // BATCH, 1)]
    matrices = {}
    for index, layer in enumerate(model.model.layers):
        hessians = _hessians(model, layer, batches)
        for name, module in _linears(model).items():
            if not name.startswith(f"model.layers.{index}."):
                continue
            bits = 8 if name in precise else config.bits
            hessian = hessians[_as(name, LEADER)]
            matrices[name] = gptq(module.weight, hessian, bits, config.group_size, config.damp)
            module.weight.data = matrices[name].dequantize()
    return matrices


def _hessians(model: Any, layer: Any, batches: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}
    names = {id(module): name for name, module in _linears(model).items()}

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        sums[names[id(module)]] = sums.get(names[id(module)], 0) + x.T @ x

    linears = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [module.register_forward_pre_hook(hook) for module in linears]
    for batch in batches:
        model(batch)
    for handle in hooks:
        handle.remove()
    return sums
