"""Our Olive pass ``CalibratedGptq``: mixed int4/int8 by sensitivity, GPTQ on calibration text.

Olive's own Gptq knows one precision per run of overrides, min-max grids, and needs a data set of the hub. The
result is a checkpoint in Olive's format, which genai's builder reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from qwen_onnx.errors import ExportError
from qwen_onnx.export.calibration import calibration_ids
from qwen_onnx.export.gptq import Quantized, gptq, round_to_nearest
from qwen_onnx.export.olive import PROGRESS
from qwen_onnx.passes import CalibratedGptqConfig

# matrices with the same input share a Hessian; genai fuses q, k and v, so these share their bits too
LEADER = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
ONE_PRECISION = {"k_proj": "q_proj", "v_proj": "q_proj"}
BATCH = 4  # windows


class CalibratedGptq(Pass):  # type: ignore[misc]
    """Quantise the matrices of a Qwen checkpoint."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return {
            name: PassConfigParam(type_=Any, default_value=field.get_default(), description=field.description or name)
            for name, field in CalibratedGptqConfig.model_fields.items()
        }

    def _run_for_config(self, model: HfModelHandler, config: BasePassConfig, output_model_path: str) -> HfModelHandler:
        given = {name: getattr(config, name) for name in CalibratedGptqConfig.model_fields}
        quantize(Path(model.model_name_or_path), Path(output_model_path), CalibratedGptqConfig.model_validate(given))
        return HfModelHandler(output_model_path)


def quantize(checkpoint: Path, output: Path, config: CalibratedGptqConfig) -> None:
    """Write a quantised copy of ``checkpoint`` in Olive's format to ``output``.

    Raises:
        ExportError: a matrix does not divide into blocks.
    """
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(config.seed)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.config.use_cache = False
    # not AutoTokenizer: transformers 5 rebuilds a Qwen2 tokenizer and then splits otherwise than tokenizer.json
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    _require_blocks(model, config.group_size)
    ids = torch.tensor(calibration_ids(tokenizer, config.windows, config.window, config.seed))
    precise = choose_int8(model, ids[: config.sensitivity_windows], config)
    matrices = quantize_layers(model, ids, precise, config)
    if config.head_bits < 16:
        head = model.get_output_embeddings().weight.detach()
        matrices["lm_head"] = round_to_nearest(head, config.head_bits, config.group_size, config.symmetric)
    _save(model, checkpoint, output, matrices, config)


def _progress(message: str) -> None:
    """The parent process shows lines with this prefix."""
    print(f"{PROGRESS}{message}", flush=True)


def _linears(layer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}


def _all_linears(model: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
    for index, layer in enumerate(model.model.layers):
        for name, module in _linears(layer).items():
            yield f"model.layers.{index}.{name}", module


def _require_blocks(model: Any, block: int) -> None:
    for name, module in _all_linears(model):
        if module.in_features % block:
            raise ExportError(
                f"{name} has {module.in_features} inputs, no multiple of the block size {block}",
                hint="set group_size of the quantize step for this model",
            )


def _named_as(name: str, table: dict[str, str]) -> str:
    parent, _, last = name.rpartition(".")
    return f"{parent}.{table.get(last, last)}"


def choose_int8(model: Any, ids: torch.Tensor, config: CalibratedGptqConfig) -> set[str]:
    """Names of the matrices that get 8 bits: those that gain most per weight, within ``int8_share``.

    The gain is ½ Σ F·δ² with the diagonal Fisher information F and the 4-bit rounding error δ: the second-order
    growth of the KL divergence (Dong et al. 2019, arXiv:1905.03696; labels are sampled from the model, so that F
    is the true Fisher and not the empirical one).

    Args:
        ids: [windows, tokens].
    """
    if not config.int8_share:
        return set()
    fisher = _fisher(model, ids)
    gains: dict[str, float] = {}
    sizes: dict[str, int] = {}
    members: dict[str, set[str]] = {}
    for name, module in _all_linears(model):
        unit = _named_as(name, ONE_PRECISION)
        weight = module.weight.detach()
        delta = round_to_nearest(weight, config.bits, config.group_size, config.symmetric).dequantize() - weight
        gains[unit] = gains.get(unit, 0.0) + float((fisher[name] * delta**2).sum())
        sizes[unit] = sizes.get(unit, 0) + weight.numel()
        members.setdefault(unit, set()).add(name)
    budget = config.int8_share * sum(sizes.values())
    chosen: set[str] = set()
    for unit in sorted(gains, key=lambda unit: gains[unit] / sizes[unit], reverse=True):
        if sizes[unit] <= budget:
            budget -= sizes[unit]
            chosen |= members[unit]
    return chosen


def _fisher(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    linears = dict(_all_linears(model))
    model.requires_grad_(False)
    for module in linears.values():
        module.weight.requires_grad_(True)
    fisher = {name: torch.zeros_like(module.weight) for name, module in linears.items()}
    for index, window in enumerate(ids):
        _progress(f"sensitivity of the weights: window {index + 1} of {len(ids)}")
        logits = model(window[None]).logits[0]
        sampled = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, sampled, reduction="sum")
        gradients = torch.autograd.grad(loss, [module.weight for module in linears.values()])
        for name, gradient in zip(linears, gradients, strict=True):
            fisher[name] += gradient**2
    model.requires_grad_(False)
    return fisher


@torch.no_grad()
def quantize_layers(
    model: Any, ids: torch.Tensor, precise: set[str], config: CalibratedGptqConfig
) -> dict[str, Quantized]:
    """GPTQ layer by layer; each layer sees the inputs that the quantised layers before it produce.

    The model's own weights become the quantised ones.

    Args:
        ids: [windows, tokens].
        precise: names of the matrices with 8 bits.
    """
    states, arguments = _first_inputs(model, ids)
    matrices: dict[str, Quantized] = {}
    for index, layer in enumerate(model.model.layers):
        hessians = _hessians(layer, states, arguments)
        for name, module in _linears(layer).items():
            full = f"model.layers.{index}.{name}"
            bits = 8 if full in precise else config.bits
            hessian = hessians[_named_as(name, LEADER)]
            matrices[full] = gptq(module.weight, hessian, bits, config.group_size, config.damp, config.symmetric)
            module.weight.data = matrices[full].dequantize()
        states = [_run(layer, state, arguments) for state in states]
        _progress(f"quantised layer {index + 1} of {len(model.model.layers)}")
    return matrices


def _first_inputs(model: Any, ids: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Hidden states before the first layer, by batch, and what else a layer is called with."""
    states: list[torch.Tensor] = []
    arguments: dict[str, Any] = {}

    class Caught(Exception):
        pass

    def catch(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])
        arguments.update({name: value for name, value in kwargs.items() if name != "hidden_states"})
        raise Caught

    hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    # whole batches only: all share the masks and positions of the last one
    for batch in torch.split(ids, min(BATCH, len(ids)))[: max(len(ids) // BATCH, 1)]:
        try:
            model(batch)
        except Caught:
            continue
    hook.remove()
    return states, arguments


def _run(layer: torch.nn.Module, state: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    out = layer(state, **arguments)
    result: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return result


def _hessians(layer: torch.nn.Module, states: list[torch.Tensor], arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}

    def accumulate(name: str) -> Any:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    leaders = {name: module for name, module in _linears(layer).items() if _named_as(name, LEADER) == name}
    hooks = [module.register_forward_pre_hook(accumulate(name)) for name, module in leaders.items()]
    for state in states:
        _run(layer, state, arguments)
    for hook in hooks:
        hook.remove()
    return sums


def _save(
    model: Any, checkpoint: Path, output: Path, matrices: dict[str, Quantized], config: CalibratedGptqConfig
) -> None:
    import shutil

    from safetensors.torch import save_file

    replaced = {f"{name}.weight" for name in matrices}
    if model.config.tie_word_embeddings:
        replaced.add("lm_head.weight")
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name not in replaced}
    for name, matrix in matrices.items():
        parts = matrix.packed()
        if config.symmetric:
            # Olive's format: without zero points every one is the middle of the grid
            del parts["qzeros"]
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    settings["quantization_config"] = {
        "quant_method": "olive",
        "bits": config.bits,
        "symmetric": config.symmetric,
        "group_size": config.group_size,
        "lm_head": "lm_head" in matrices,
        "embeds": False,
        "overrides": {name: {"bits": matrix.bits} for name, matrix in matrices.items() if matrix.bits != config.bits},
    }
    (output / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    for path in checkpoint.iterdir():
        weights = path.suffix in {".safetensors", ".bin"} or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name != "config.json":
            shutil.copyfile(path, output / path.name)
