"""Which block each matrix gets: ONNX Runtime rounds activations to 8 bits in the blocks of the matrix that they meet.

Finer blocks keep that rounding small and cost time, a scale and a sum to read for each. Few matrices need them, and
many do as well with coarser ones: together they take no more scales than one block for all, unless the KLD that is
predicted asks for more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from qwen_onnx.export.allocation import Allocation, Choice, Unreachable, allocate
from qwen_onnx.export.gradients import Gradients, Kept
from qwen_onnx.export.passes.gptq.options import FLOAT_BITS, CalibratedGptqOptions
from qwen_onnx.export.passes.gptq.sensitivity import ONE_PRECISION, named_as
from qwen_onnx.export.progress import progress
from qwen_onnx.export.skeleton import Skeleton
from qwen_onnx.export.weights import row_pieces
from qwen_onnx.export.workfolder import WorkFolder

HEAD_MATRIX = "lm_head"
STEP, HEAD_STEP = "blocks", "blocks-head"
# positions that tell what rounding does to the head
SAMPLES = 256
# of an activation's code: its largest, and the variance of what is rounded off, in steps
TOP, VARIANCE = 127, 1 / 12
# what a block takes beside its codes: a scale and, of zero points, the sum that kernels make of them
BLOCK_BYTES = 8
# KLD by block
Damage = dict[int, float]


def choose_blocks(
    skeleton: Skeleton, ids: torch.Tensor, config: CalibratedGptqOptions, work: WorkFolder
) -> dict[str, int]:
    """Weights that share a scale, of each matrix that has not ``config.group_size`` of them.

    The damage is the second-order growth of the KL divergence, ½ Σ g²·w²·Δ² / 12 over tokens, outputs and inputs: g is
    the gradient at an output with labels sampled from the model, Δ the step of the block that a token's input is
    rounded in, its largest value by 127.

    Args:
        ids: [windows, tokens].
        work: keeps every finished layer of the forward and of the backward pass.
    """
    if not config.mixed_blocks:
        return {}
    known = work.finished(STEP)
    if known is None:
        known = {"blocks": _chosen(_choices(skeleton, ids, config, work), skeleton, config)}
        work.commit(STEP, [], known)
    return dict(known["blocks"])


def _chosen(choices: dict[str, list[Choice]], skeleton: Skeleton, config: CalibratedGptqOptions) -> dict[str, int]:
    usual = str(config.group_size)
    same = [choice for options in choices.values() for choice in options if choice.option == usual]
    found = allocate(choices, most_bytes=sum(choice.bytes for choice in same))
    if config.rounding_kld is not None and found.damage > config.rounding_kld:
        found = _finer(choices, config.rounding_kld)
    counts = ", ".join(f"{count} of {block}" for block, count in sorted(Counter(found.options.values()).items()))
    progress(f"blocks: {counts}; predicted KLD of rounded activations {found.damage:.4g}")
    blocks = {unit: int(option) for unit, option in found.options.items() if option != usual}
    names = [f"model.layers.{index}.{name}" for index in range(skeleton.count) for name in skeleton.linears(index)]
    fused = {name: named_as(name, ONE_PRECISION) for name in (*names, HEAD_MATRIX)}
    return {name: blocks[unit] for name, unit in fused.items() if unit in blocks}


def _finer(choices: dict[str, list[Choice]], damage: float) -> Allocation:
    """As few scales as keep to ``damage``; the finest blocks where nothing does, and the drift is then judged."""
    try:
        return allocate(choices, most_damage=damage)
    except Unreachable:
        return allocate(
            choices, most_bytes=sum(max(choice.bytes for choice in options) for options in choices.values())
        )


def _choices(
    skeleton: Skeleton, ids: torch.Tensor, config: CalibratedGptqOptions, work: WorkFolder
) -> dict[str, list[Choice]]:
    """Bytes of scales and KLD of every block, by the matrix or the first of those that genai fuses."""
    run = Gradients(skeleton, skeleton.arguments(skeleton.embed(ids[:1])), work, "what rounded activations cost")
    harms: dict[str, Damage] = {}
    sizes: Counter[str] = Counter()
    if config.head_bits < FLOAT_BITS:
        harms[HEAD_MATRIX] = _head_damage(run, ids, config)
        sizes[HEAD_MATRIX] = skeleton.weights.tensor(skeleton.head_name).numel()
    layers = run.run(ids, config.seed, partial(_watch, skeleton, config))
    for index, layer in enumerate(layers):
        modules = skeleton.linears(index)
        for name, damage in layer.items():
            unit = f"model.layers.{index}.{named_as(name, ONE_PRECISION)}"
            sizes[unit] += modules[name].weight.numel()
            mine = harms.setdefault(unit, {})
            for block, harm in _by_block(damage).items():
                mine[block] = mine.get(block, 0.0) + harm / ids.numel()
    return {
        unit: [Choice(BLOCK_BYTES * sizes[unit] // block, harm, str(block)) for block, harm in damage.items()]
        for unit, damage in harms.items()
    }


def _watch(skeleton: Skeleton, config: CalibratedGptqOptions, index: int) -> Callable[[], Kept]:
    """Sums the damage of each matrix of a layer over its tokens."""
    modules = skeleton.linears(index)
    sums: dict[str, Counter[int]] = {name: Counter() for name in modules}

    def hook(name: str, module: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])

        def add(gradient: torch.Tensor) -> None:
            squared = gradient.detach().reshape(-1, gradient.shape[-1]).square()
            weights = squared @ module.get_parameter("weight").detach().square()
            sums[name].update(rounding_damage(x, weights, _blocks(x.shape[1], config)))

        output.register_hook(add)  # type: ignore[no-untyped-call]

    hooks = [module.register_forward_hook(partial(hook, name)) for name, module in modules.items()]

    def found() -> Kept:
        for one in hooks:
            one.remove()
        return {name: dict(damage) for name, damage in sums.items()}, []

    return found


def _blocks(inputs: int, config: CalibratedGptqOptions) -> list[int]:
    """Half of the usual block, that, and twice as many weights where rows divide into them."""
    usual = config.group_size
    return [block for block in (usual // 2, usual, usual * 2) if inputs % block == 0]


def rounding_damage(inputs: torch.Tensor, weights: torch.Tensor, blocks: Sequence[int]) -> Damage:
    """KLD of rounding ``inputs`` in each of ``blocks``, summed over tokens.

    Args:
        inputs: [tokens, in].
        weights: [tokens, in], twice the KLD of a squared error of one at an input.
    """
    damage = {}
    for block in blocks:
        steps = inputs.reshape(len(inputs), -1, block).abs().amax(-1) / TOP
        weight = weights.reshape(len(weights), -1, block).sum(-1)
        # row by row first: a sum over all at once depends on the number of threads
        damage[block] = float((steps.square() * weight).sum(1).sum()) * VARIANCE / 2
    return damage


@torch.no_grad()
def _head_damage(run: Gradients, ids: torch.Tensor, config: CalibratedGptqOptions) -> Damage:
    """KLD of a token by block; of the head no labels need be drawn: the variance of a column under the model's odds."""
    known = run.work.finished(HEAD_STEP)
    if known is None:
        run.forward(ids)
        states = run.normed(ids).flatten(0, 1)
        x = states[:: max(len(states) // SAMPLES, 1)]
        head = run.skeleton.weights.tensor(run.skeleton.head_name)
        odds = torch.empty(len(x), len(head))
        for rows in row_pieces(*head.shape):
            odds[:, rows] = x @ head[rows].float().T
        odds = odds.softmax(-1)
        mean, square = torch.zeros_like(x), torch.zeros_like(x)
        for rows in row_pieces(*head.shape):
            part = head[rows].float()
            mean += odds[:, rows] @ part
            square += odds[:, rows] @ part.square()
        damage = rounding_damage(x, square - mean.square(), _blocks(x.shape[1], config))
        known = {str(block): harm / len(x) for block, harm in damage.items()}
        run.work.commit(HEAD_STEP, [], known)
    return _by_block(known)


def _by_block(damage: Mapping[Any, float]) -> Damage:
    """JSON has no keys but strings."""
    return {int(block): harm for block, harm in damage.items()}
