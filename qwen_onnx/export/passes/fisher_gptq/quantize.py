"""Our Olive pass ``FisherGptq``: every matrix on the grid that the model's answers can best afford.

One pass forward and backward through the checkpoint, one decoder layer in memory at a time, tells which inputs and
outputs of a matrix matter to the loss. Each matrix is solved on several grids; when all are, a knapsack chooses one for
each, for a size or for a KLD. The result is a checkpoint in Olive's format, which genai's builder reads.

Codes of fewer bits than their matrix has room for are small numbers; ``PackWeights`` stores them without the room.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from qwen_onnx.errors import ExportError
from qwen_onnx.export.allocation import Allocation, Choice, Unreachable, allocate
from qwen_onnx.export.calibration import calibration_ids, own_text
from qwen_onnx.export.experts import CODED, STACKED
from qwen_onnx.export.gradients import Gradients, Kept
from qwen_onnx.export.olive_format import UNCODED, assemble, require_blocks, work_folder
from qwen_onnx.export.options import chosen, parameters
from qwen_onnx.export.passes.fisher_gptq.experts import RoutedTokens
from qwen_onnx.export.passes.fisher_gptq.head import HEAD_STEP, quantize_head
from qwen_onnx.export.passes.fisher_gptq.kernels import Kernel, held, kernel_of, usual_kernel
from qwen_onnx.export.passes.fisher_gptq.options import FLOAT_BITS, FisherGptqOptions
from qwen_onnx.export.passes.fisher_gptq.sizes import (
    counted,
    grids,
    head_grid,
    most_bytes,
    nodes_bytes,
    other_bytes,
    out_of_reach,
    require_room,
)
from qwen_onnx.export.passes.fisher_gptq.solver import Grid, damage, damped, on_grids, stored_bytes
from qwen_onnx.export.passes.fisher_gptq.statistics import Unit, Watch
from qwen_onnx.export.passes.gptq.sensitivity import ONE_PRECISION, named_as
from qwen_onnx.export.passes.gptq.solver import Quantized
from qwen_onnx.export.progress import progress
from qwen_onnx.export.skeleton import COMPUTED, Skeleton
from qwen_onnx.export.weights import Scratch, mapped_safetensors, write_safetensors
from qwen_onnx.export.workfolder import KEPT_FOLDER, PREDICTION, WorkFolder
from qwen_onnx.processes.memory import return_free_memory
from qwen_onnx.records import digest_of
from qwen_onnx.sources.checkpoint import read_json

# numbers of the hidden states that run through a layer at once: of small models, a window alone keeps no core busy
TOGETHER = 1 << 19


class FisherGptq(Pass):  # type: ignore[misc]
    """Quantise the matrices of a Qwen checkpoint for a size or a KLD."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return parameters(FisherGptqOptions)

    def _run_for_config(self, model: HfModelHandler, config: BasePassConfig, output_model_path: str) -> HfModelHandler:
        settings, output = chosen(FisherGptqOptions, config), Path(output_model_path)
        kept = Path(KEPT_FOLDER)
        found = quantize(Path(model.model_name_or_path), output, settings, kept.resolve() if kept.exists() else None)
        Path(PREDICTION).write_text(json.dumps(found), encoding="utf-8")
        return HfModelHandler(output_model_path)


def quantize(checkpoint: Path, output: Path, config: FisherGptqOptions, kept: Path | None = None) -> dict[str, float]:
    """Write a quantised copy of ``checkpoint`` in Olive's format to ``output``.

    Args:
        checkpoint: Hugging Face folder; its safetensors may be sharded.
        output: gets one safetensors file per layer and an index.
        kept: folder for finished layers, which the same call finds again; None keeps nothing.

    Returns:
        ``bytes`` of the model's files and the ``kld`` that are expected.

    Raises:
        ExportError: a matrix does not divide into blocks, no allocation keeps to the bound, a weight is missing, or a
            kept file was altered.
    """
    from transformers import PreTrainedTokenizerFast

    with work_folder(kept, output) as folder:
        skeleton = Skeleton(checkpoint, Scratch(folder / "scratch"))
        require_blocks(skeleton, config.group_size)
        require_room(skeleton, config)
        # not AutoTokenizer: transformers 5 rebuilds a Qwen2 tokenizer and then splits otherwise than tokenizer.json
        tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint, trust_remote_code=False)
        own = own_text(config.calibration)
        ids = torch.tensor(calibration_ids(tokenizer, config.windows, config.window, config.seed, own))
        return_free_memory()
        settings = read_json(checkpoint / "config.json")
        # another bound chooses among the same grids
        asked = config.model_dump(mode="json", exclude={"bits_per_weight", "max_bytes", "max_kld"})
        work = WorkFolder(folder, digest_of([asked, settings, ids.tolist(), skeleton.weights.fingerprint()]))
        run = Gradients(
            skeleton,
            skeleton.arguments(skeleton.embed(ids[:1])),
            work,
            "what the loss says of the weights",
            together=max(TOGETHER // (config.window * skeleton.config.hidden_size), 1),
        )
        quantize_head(run, ids, config)
        layers = run.run(ids, config.seed, lambda index: _watch(skeleton, index, config, ids.numel(), work))
        allocation, predicted = _allocation(skeleton, layers, config, work)
        for index in range(skeleton.count):
            _write_layer(skeleton, index, allocation, config, work)
        _assemble(skeleton, allocation, checkpoint, output, config, work)
    return predicted


def _watch(
    skeleton: Skeleton, index: int, config: FisherGptqOptions, tokens: int, work: WorkFolder
) -> Callable[[], Kept]:
    watch = Watch(skeleton, index)
    routed = {
        name: RoutedTokens(experts, skeleton.scratch, tokens, skeleton.config.num_experts_per_tok)
        for name, experts in skeleton.experts(index).items()
    }

    def solved() -> Kept:
        """Every matrix of the layer on every grid, in files, and what each grid costs."""
        name, units = f"grids-{index:04d}.safetensors", watch.units()
        # the widest first, so that none is left to run alone
        order = sorted(units, key=lambda unit: -len(unit.hessian))
        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(threads) as pool:
                done = pool.map(lambda unit: _solve(unit, watch.modules, config, tokens), order)
                tensors: dict[str, torch.Tensor] = {}
                choices: dict[str, list[dict[str, Any]]] = {}
                for unit, (grids, costs) in zip(order, done, strict=True):
                    tensors |= grids
                    choices[unit.names[0]] = costs
                write_safetensors(work.temporary(name), tensors)
                tensors.clear()
                for module, experts in routed.items():
                    place = work.temporary(_experts_file(index))
                    choices[module] = experts.solved(place, pool, config, f"layer {index + 1}")
        finally:
            torch.set_num_threads(threads)
        return choices, [name, *(_experts_file(index) for _ in routed)]

    return solved


def _experts_file(index: int) -> str:
    return f"experts-{index:04d}.safetensors"


@torch.no_grad()
def _solve(
    unit: Unit, modules: dict[str, torch.nn.Linear], config: FisherGptqOptions, tokens: int
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Tensors by ``<grid>|<matrix>.<part>``, and of each grid its bytes and damage."""
    # threads of its own would wait for those of the other matrices
    torch.set_num_threads(1)
    weight = torch.cat([modules[name].weight.detach() for name in unit.names])
    hessian = damped(unit.hessian, config.damp)
    tried = [grid for grid in grids(config) if grid.bits < FLOAT_BITS]
    found = on_grids(weight, hessian, tried, config.refinements)
    harms = [damage(one, weight, unit.hessian, unit.shares, tokens) for one in found]
    costs: list[dict[str, Any]] = []
    # a matrix that stays as it is, the last, does no harm
    for grid, harm in zip(grids(config), [*harms, 0.0], strict=False):
        planes = len(unit.names) * nodes_bytes(grid, config)
        costs.append({"option": grid.name, "bytes": stored_bytes(weight, grid), "planes": planes, "damage": harm})
    tensors: dict[str, torch.Tensor] = {}
    for grid, one in zip(tried, found, strict=True):
        begin = 0
        for name in unit.names:
            rows = slice(begin, begin + modules[name].out_features)
            begin = rows.stop
            bits = kernel_of(grid, config).bits
            part = Quantized(one.codes[rows], one.scales[rows], one.zeros[rows], bits)
            tensors |= {f"{grid.name}|{name}.{key}": value for key, value in part.packed().items()}
    return tensors, costs


def _allocation(
    skeleton: Skeleton, layers: list[dict[str, Any]], config: FisherGptqOptions, work: WorkFolder
) -> tuple[Allocation, dict[str, float]]:
    """The grid of every unit, by ``<layer>.<matrix>``, and what ``quantize`` returns."""
    head = work.finished(HEAD_STEP) or {}
    known = {f"{index}.{unit}": costs for index, layer in enumerate(layers) for unit, costs in layer.items()}
    planes = {(unit, cost["option"]): cost["planes"] for unit, costs in known.items() for cost in costs}
    choices = {
        unit: [
            Choice(cost["bytes"] + counted(cost["planes"], config), cost["damage"], cost["option"]) for cost in costs
        ]
        for unit, costs in known.items()
    }
    other = head["bytes"] + other_bytes(skeleton, config)
    try:
        if config.max_kld is not None:
            found = allocate(choices, most_damage=config.max_kld - head["damage"])
        else:
            found = allocate(choices, most_bytes=most_bytes(skeleton, config) - other)
    except Unreachable as fault:
        kld = f"a predicted KLD of {fault.least + head['damage']:.4g}"
        size = f"{(fault.least + other) / 1e6:.1f} MB of files"
        raise out_of_reach(skeleton, config, size if config.max_kld is None else kld) from fault
    if config.kernel != "int8" and all(Grid.of(option).bits > 4 for option in found.options.values()):
        raise ExportError(
            "the bound leaves no matrix that needs as few as 4 bits",
            where=str(skeleton.weights.folder),
            hint="give a smaller --max-size or a larger --max-kld, or another --precision",
        )
    total, kld = found.bytes + other, found.damage + head["damage"]
    if config.bits_per_weight is not None:
        total += sum(planes[choice] for choice in found.options.items())
    progress(f"{total / 1e6:.1f} MB with a predicted KLD of {kld:.4f}, of which the head has {head['damage']:.4f}")
    return found, {"bytes": total, "kld": float(f"{kld:.4g}")}


def _write_layer(
    skeleton: Skeleton, index: int, allocation: Allocation, config: FisherGptqOptions, work: WorkFolder
) -> None:
    """The layer's file of the result: its matrices on the chosen grids, the rest as it is, in float32."""
    step, prefix = f"layer-{index:04d}", f"model.layers.{index}"
    linears, experts = skeleton.linears(index), skeleton.experts(index)
    options = {name: allocation.options[f"{index}.{named_as(name, ONE_PRECISION)}"] for name in (*linears, *experts)}
    if work.finished(step) == {"options": options}:
        return
    solved = mapped_safetensors(work.required(f"backward-{index:04d}", f"grids-{index:04d}.safetensors"))
    tensors: dict[str, torch.Tensor] = {}
    for name in linears:
        grid = Grid.of(options[name])
        if grid.bits == FLOAT_BITS:
            tensors[f"{prefix}.{name}.weight"] = skeleton.weights.tensor(f"{prefix}.{name}.weight").float()
            continue
        packed = {part: solved[f"{grid.name}|{name}.{part}"] for part in CODED}
        tensors |= {
            f"{prefix}.{name}.{part}": value for part, value in held(packed, grid, kernel_of(grid, config)).items()
        }
    for name in experts:
        solved = mapped_safetensors(work.required(f"backward-{index:04d}", _experts_file(index)))
        for part in (f"{matrix}.{part}" for matrix in STACKED for part in CODED):
            tensors[f"{prefix}.{name}.{part}"] = solved[f"{options[name]}|{part}"]
    replaced = (*(f"{prefix}.{name}.weight" for name in linears), *(f"{prefix}.{name}." for name in experts))
    for name in skeleton.weights.names(f"{prefix}."):
        if not name.startswith(replaced) and not name.endswith(COMPUTED):
            tensors[name] = skeleton.weights.tensor(name).float()
    write_safetensors(work.temporary(f"{step}.safetensors"), tensors)
    work.commit(step, [f"{step}.safetensors"], {"options": options})


def _assemble(
    skeleton: Skeleton,
    allocation: Allocation,
    checkpoint: Path,
    output: Path,
    config: FisherGptqOptions,
    work: WorkFolder,
) -> None:
    usual, floats = usual_kernel(config), []
    kernels: dict[str, Kernel] = {}
    if config.head_bits < FLOAT_BITS:
        kernels["lm_head"] = kernel_of(head_grid(config), config)
    for index in range(skeleton.count):
        for name in skeleton.linears(index):
            grid = Grid.of(allocation.options[f"{index}.{named_as(name, ONE_PRECISION)}"])
            if grid.bits == FLOAT_BITS:
                floats.append(f"model.layers.{index}.{name}")
            else:
                kernels[f"model.layers.{index}.{name}"] = kernel_of(grid, config)
    overrides = {
        name: {"bits": kernel.bits, "group_size": kernel.block} for name, kernel in kernels.items() if kernel != usual
    }
    steps = [HEAD_STEP, *(f"layer-{index:04d}" for index in range(skeleton.count))]
    settings = {
        "bits": usual.bits,
        "symmetric": config.kernel == "symmetric",
        "group_size": usual.block,
        "lm_head": "lm_head" in kernels,
        "overrides": overrides,
    }
    if floats:
        settings[UNCODED] = floats
    assemble([work.required(step, f"{step}.safetensors") for step in steps], checkpoint, output, settings)
