"""Which matrices get 8 bits, by the Fisher information of the weights, one decoder layer in memory at a time.

The squared gradients of one layer's matrices become one number per matrix before the next layer is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from qwen_onnx.export.gradients import Gradients, Kept, taken
from qwen_onnx.export.passes.gptq.options import CalibratedGptqOptions
from qwen_onnx.export.passes.gptq.solver import round_to_nearest
from qwen_onnx.export.skeleton import Skeleton
from qwen_onnx.export.weights import row_pieces
from qwen_onnx.export.workfolder import WorkFolder

# matrices with the same input share a Hessian
LEADER = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj", "in_proj_z": "in_proj_qkv"}
# genai fuses q, k and v, so these share their bits
ONE_PRECISION = {"k_proj": "q_proj", "v_proj": "q_proj"}
STEP = "sensitivity"
# gain and size of each matrix, by its name
Scores = dict[str, dict[str, float]]


def named_as(name: str, table: dict[str, str]) -> str:
    """``name`` with its last part replaced as ``table`` says."""
    parent, _, last = name.rpartition(".")
    return f"{parent}.{table.get(last, last)}"


def choose_int8(skeleton: Skeleton, ids: torch.Tensor, config: CalibratedGptqOptions, work: WorkFolder) -> set[str]:
    """Names of the matrices that get 8 bits: those that gain most per weight, within ``int8_share``.

    The gain is ½ Σ F·δ² with the diagonal Fisher information F and the 4-bit rounding error δ: the second-order
    growth of the KL divergence (Dong et al. 2019, arXiv:1905.03696; labels are sampled from the model, so that F
    is the true Fisher and not the empirical one).

    Args:
        ids: [windows, tokens].
        work: keeps every finished layer of the forward and of the backward pass.
    """
    if not config.int8_share:
        return set()
    known = work.finished(STEP)
    if known is None:
        known = {"int8": sorted(_within_share(_gains(skeleton, ids, config, work), config.int8_share))}
        work.commit(STEP, [], known)
    return set(known["int8"])


def _within_share(scores: Scores, share: float) -> set[str]:
    gains: dict[str, float] = {}
    sizes: dict[str, float] = {}
    members: dict[str, set[str]] = {}
    for name, score in scores.items():
        unit = named_as(name, ONE_PRECISION)
        gains[unit] = gains.get(unit, 0.0) + score["gain"]
        sizes[unit] = sizes.get(unit, 0) + score["size"]
        members.setdefault(unit, set()).add(name)
    budget = share * sum(sizes.values())
    chosen: set[str] = set()
    for unit in sorted(gains, key=lambda unit: gains[unit] / sizes[unit], reverse=True):
        if sizes[unit] <= budget:
            budget -= sizes[unit]
            chosen |= members[unit]
    return chosen


def _gains(skeleton: Skeleton, ids: torch.Tensor, config: CalibratedGptqOptions, work: WorkFolder) -> Scores:
    """Gain and number of weights by matrix, in the order of the layers."""

    def watch(index: int) -> Callable[[], Kept]:
        fisher = _watch(skeleton, index)

        def scores() -> Kept:
            found = {
                f"model.layers.{index}.{matrix}": {
                    "gain": _gain(skeleton, module.weight.detach(), fisher[matrix], config),
                    "size": module.weight.numel(),
                }
                for matrix, module in skeleton.linears(index).items()
            }
            return found, []

        return scores

    run = Gradients(skeleton, skeleton.arguments(skeleton.embed(ids[:1])), work, "sensitivity of the weights")
    layers = run.run(ids, config.seed, watch)
    return {name: score for layer in layers for name, score in layer.items()}


def _watch(skeleton: Skeleton, index: int) -> dict[str, torch.Tensor]:
    """Sums of squared gradients of the layer's matrices; each gradient is dropped as soon as it is added."""
    fisher: dict[str, torch.Tensor] = {}

    def add(name: str, weight: torch.Tensor) -> None:
        gradient = taken(weight)
        for piece in row_pieces(*weight.shape):
            fisher[name][piece] += gradient[piece] ** 2

    for name, module in skeleton.linears(index).items():
        fisher[name] = skeleton.scratch.zeros(f"fisher.{name}", tuple(module.weight.shape))
        module.weight.requires_grad_(True)
        module.weight.register_post_accumulate_grad_hook(partial(add, name))  # type: ignore[no-untyped-call]
    return fisher


def _gain(skeleton: Skeleton, weight: torch.Tensor, fisher: torch.Tensor, config: CalibratedGptqOptions) -> float:
    delta = skeleton.scratch.zeros("delta", tuple(weight.shape))
    for piece in row_pieces(*weight.shape):
        rows = weight[piece]
        grid = round_to_nearest(rows, config.bits, config.group_size, config.symmetric)
        delta[piece] = grid.dequantize() - rows
    # row by row first: a sum over all at once depends on the number of threads
    return float(delta.pow_(2).mul_(fisher).sum(1).sum())
