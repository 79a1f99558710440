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
from qwen_onnx.export.calibration import calibration_ids, own_text
from qwen_onnx.export.gradients import Gradients, Kept
from qwen_onnx.export.olive_format import assemble, require_blocks, work_folder
from qwen_onnx.export.options import chosen, parameters
from qwen_onnx.export.passes.fisher_gptq.allocation import Allocation, Choice, Unreachable, allocate
from qwen_onnx.export.passes.fisher_gptq.head import HEAD_STEP, quantize_head
from qwen_onnx.export.passes.fisher_gptq.kernels import USUAL, Kernel, held, kernel_of, plane_bytes
from qwen_onnx.export.passes.fisher_gptq.options import BLOCK, LAYER_BYTES, FisherGptqOptions
from qwen_onnx.export.passes.fisher_gptq.solver import Grid, damage, damped, nearest, refine, solve, stored_bytes
from qwen_onnx.export.passes.fisher_gptq.statistics import Unit, Watch
from qwen_onnx.export.passes.gptq.sensitivity import ONE_PRECISION, named_as
from qwen_onnx.export.passes.gptq.solver import Quantized
from qwen_onnx.export.progress import progress
from qwen_onnx.export.skeleton import COMPUTED, EMBEDDING, Skeleton
from qwen_onnx.export.weights import Scratch, mapped_safetensors, write_safetensors
from qwen_onnx.export.workfolder import KEPT_FOLDER, PREDICTION, WorkFolder
from qwen_onnx.processes.memory import return_free_memory
from qwen_onnx.records import digest_of
from qwen_onnx.sources.checkpoint import read_json

# the best of each size, and what rounding alone does well: docs/lab-log.md
GRIDS = {
    "mixed": (Grid(4, BLOCK), Grid(4, BLOCK // 2), Grid(8, BLOCK)),
    "int8": tuple(Grid(bits, BLOCK) for bits in (4, 5, 6, 7, 8)),
}
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
        require_blocks(skeleton, BLOCK)
        _require_room(skeleton, config)
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

    def solved() -> Kept:
        """Every matrix of the layer on every grid, in a file, and what each grid costs."""
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
        finally:
            torch.set_num_threads(threads)
        write_safetensors(work.temporary(name), tensors)
        return choices, [name]

    return solved


@torch.no_grad()
def _solve(
    unit: Unit, modules: dict[str, torch.nn.Linear], config: FisherGptqOptions, tokens: int
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Tensors by ``<grid>|<matrix>.<part>``, and of each grid its bytes and damage."""
    # threads of its own would wait for those of the other matrices
    torch.set_num_threads(1)
    weight = torch.cat([modules[name].weight.detach() for name in unit.names])
    hessian = damped(unit.hessian, config.damp)
    fine = [grid for grid in GRIDS[config.kernel] if grid.bits < 8]
    eight = [grid for grid in GRIDS[config.kernel] if grid.bits == 8]
    found = refine(solve(weight, hessian, fine), weight, hessian, config.refinements)
    found += [nearest(weight, hessian.diagonal(), grid) for grid in eight]
    tensors: dict[str, torch.Tensor] = {}
    costs: list[dict[str, Any]] = []
    for grid, one in zip([*fine, *eight], found, strict=True):
        harm = damage(one, weight, unit.hessian, unit.shares, tokens)
        planes = len(unit.names) * plane_bytes(grid, kernel_of(grid, config))
        costs.append({"option": grid.name, "bytes": stored_bytes(weight, grid), "planes": planes, "damage": harm})
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
            Choice(cost["bytes"] + _counted(cost["planes"], config), cost["damage"], cost["option"]) for cost in costs
        ]
        for unit, costs in known.items()
    }
    other = head["bytes"] + _other_bytes(skeleton, config)
    try:
        if config.max_kld is not None:
            found = allocate(choices, most_damage=config.max_kld - head["damage"])
        else:
            found = allocate(choices, most_bytes=_most_bytes(skeleton, config) - other)
    except Unreachable as fault:
        kld = f"a predicted KLD of {fault.least + head['damage']:.4g}"
        size = f"{(fault.least + other) / 1e6:.1f} MB of files"
        raise _out_of_reach(skeleton, config, size if config.max_kld is None else kld) from fault
    total, kld = found.bytes + other, found.damage + head["damage"]
    if config.bits_per_weight is not None:
        total += sum(planes[choice] for choice in found.options.items())
    progress(f"{total / 1e6:.1f} MB with a predicted KLD of {kld:.4f}, of which the head has {head['damage']:.4f}")
    return found, {"bytes": total, "kld": float(f"{kld:.4g}")}


def _counted(planes: int, config: FisherGptqOptions) -> int:
    """Bytes of nodes, of which a bound for files knows and one for weights does not."""
    return planes if config.bits_per_weight is None else 0


def _out_of_reach(skeleton: Skeleton, config: FisherGptqOptions, least: str) -> ExportError:
    return ExportError(
        f"no choice of {', '.join(grid.name for grid in GRIDS[config.kernel])} keeps to the bound; least: {least}",
        where=str(skeleton.weights.folder),
        hint="give a larger --max-size or --max-kld",
    )


def _require_room(skeleton: Skeleton, config: FisherGptqOptions) -> None:
    """The smallest grids keep to the size that is asked for; known before anything is computed."""
    if config.max_kld is not None:
        return
    least = stored_bytes(skeleton.weights.tensor(skeleton.head_name), Grid(config.head_bits, BLOCK))
    least += _other_bytes(skeleton, config) + sum(
        min(
            stored_bytes(module.weight, grid) + _counted(plane_bytes(grid, kernel_of(grid, config)), config)
            for grid in GRIDS[config.kernel]
        )
        for index in range(skeleton.count)
        for module in skeleton.linears(index).values()
    )
    if least > _most_bytes(skeleton, config):
        raise _out_of_reach(skeleton, config, f"{least / 1e6:.1f} MB of files")


def _most_bytes(skeleton: Skeleton, config: FisherGptqOptions) -> int:
    """Bytes that the model's files may have."""
    if config.max_bytes is not None:
        return config.max_bytes
    assert config.bits_per_weight is not None, "the options have one bound"
    weights = skeleton.weights.tensor(skeleton.head_name).numel() + sum(
        module.weight.numel() for index in range(skeleton.count) for module in skeleton.linears(index).values()
    )
    return int(weights * config.bits_per_weight / 8) + _other_bytes(skeleton, config)


def _other_bytes(skeleton: Skeleton, config: FisherGptqOptions) -> int:
    """Bytes of the model's files besides its matrices: sines and cosines, an embedding of its own, norms, the graph."""
    sizes = skeleton.config
    head_dim = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
    rotary: int = 4 * head_dim * sizes.max_position_embeddings
    own = 0 if skeleton.head_name == EMBEDDING else 4 * sizes.vocab_size * sizes.hidden_size
    norms = sum(parameter.numel() for name, parameter in skeleton.model.named_parameters() if parameter.dim() == 1)
    head = plane_bytes(Grid(config.head_bits, BLOCK), Kernel(8, BLOCK))
    return rotary + int(own + 4 * norms) + LAYER_BYTES * (skeleton.count + 1) + head


def _write_layer(
    skeleton: Skeleton, index: int, allocation: Allocation, config: FisherGptqOptions, work: WorkFolder
) -> None:
    """The layer's file of the result: its matrices on the chosen grids, the rest as it is, in float32."""
    step, prefix = f"layer-{index:04d}", f"model.layers.{index}"
    options = {name: allocation.options[f"{index}.{named_as(name, ONE_PRECISION)}"] for name in skeleton.linears(index)}
    if work.finished(step) == {"options": options}:
        return
    grids = mapped_safetensors(work.required(f"backward-{index:04d}", f"grids-{index:04d}.safetensors"))
    tensors: dict[str, torch.Tensor] = {}
    for name, option in options.items():
        packed = {part: grids[f"{option}|{name}.{part}"] for part in ("qweight", "scales", "qzeros")}
        grid = Grid.of(option)
        tensors |= {
            f"{prefix}.{name}.{part}": value for part, value in held(packed, grid, kernel_of(grid, config)).items()
        }
    matrices = {f"{prefix}.{name}.weight" for name in options}
    for name in skeleton.weights.names(f"{prefix}."):
        if name not in matrices and not name.endswith(COMPUTED):
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
    usual = USUAL[config.kernel]
    kernels = {"lm_head": Kernel(8, usual.block)}
    for index in range(skeleton.count):
        for name in skeleton.linears(index):
            grid = Grid.of(allocation.options[f"{index}.{named_as(name, ONE_PRECISION)}"])
            kernels[f"model.layers.{index}.{name}"] = kernel_of(grid, config)
    overrides = {
        name: {"bits": kernel.bits, "group_size": kernel.block} for name, kernel in kernels.items() if kernel != usual
    }
    steps = [HEAD_STEP, *(f"layer-{index:04d}" for index in range(skeleton.count))]
    settings = {"bits": usual.bits, "symmetric": False, "group_size": usual.block, "lm_head": True}
    assemble(
        [work.required(step, f"{step}.safetensors") for step in steps],
        checkpoint,
        output,
        {**settings, "overrides": overrides},
    )
