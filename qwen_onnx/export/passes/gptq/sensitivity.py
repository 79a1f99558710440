"""Which matrices get 8 bits, by the Fisher information of the weights, one decoder layer in memory at a time.

Forward through the layers keeping each one's input in a file, then backward with recomputation: load a layer, run it
again with gradients, push the incoming gradient through. The squared gradients of one layer's matrices become one
number per matrix before the next layer is loaded (recomputation: Chen et al. 2016, arXiv:1604.06174).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qwen_onnx.export.passes.gptq.options import LOGITS_PIECE, CalibratedGptqOptions
from qwen_onnx.export.passes.gptq.solver import round_to_nearest
from qwen_onnx.export.progress import Steps
from qwen_onnx.export.skeleton import Skeleton, call
from qwen_onnx.export.weights import mapped, reopened, row_pieces
from qwen_onnx.export.workfolder import WorkFolder

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
    run = _Run(skeleton, skeleton.arguments(skeleton.embed(ids[:1])), work)
    run.forward(ids)
    run.head(ids, config.seed)
    scores: dict[int, Scores] = {}
    steps = Steps("sensitivity of the weights: backward through layer", skeleton.count)
    for index in reversed(range(skeleton.count)):
        known = work.finished(f"backward-{index:04d}")
        if known is None:
            known = run.backward(index, (*ids.shape, skeleton.config.hidden_size), config)
            steps.step(skeleton.count - index)
        scores[index] = known
    for index in range(skeleton.count + 1):
        run.forget(index)
    return {name: score for index in range(skeleton.count) for name, score in scores[index].items()}


@dataclass(frozen=True)
class _Run:
    skeleton: Skeleton
    arguments: list[dict[str, Any]]
    work: WorkFolder

    def forget(self, index: int) -> None:
        """The input of layer ``index`` and the gradient for it are not needed any more."""
        self.work.release(f"forward-{index:04d}", f"input-{index:04d}")
        step = "gradient" if index == self.skeleton.count else f"backward-{index:04d}"
        self.work.release(step, f"gradient-{index:04d}")

    def forward(self, ids: torch.Tensor) -> None:
        """Write ``input-<layer>`` [windows, tokens, hidden] for every layer, and what the last one gives."""
        count, shape = self.skeleton.count, (*ids.shape, self.skeleton.config.hidden_size)
        if self.work.finished("gradient") is not None:
            return
        if self.work.finished("forward-0000") is None:
            first = mapped(self.work.temporary("input-0000"), shape)
            for window, row in enumerate(ids):
                first[window] = self.skeleton.embed(row)
            self.work.commit("forward-0000", ["input-0000"])
        steps = Steps("sensitivity of the weights: forward through layer", count)
        for index in range(count):
            if self.work.finished(f"forward-{index + 1:04d}") is not None:
                continue
            name = f"input-{index + 1:04d}"
            before = reopened(self.work.required(f"forward-{index:04d}", f"input-{index:04d}"), shape)
            states = mapped(self.work.temporary(name), shape)
            with self.skeleton.layer(index) as layer, torch.no_grad():
                for window, state in enumerate(before):
                    states[window] = call(layer, state[None], self.arguments[index])[0]
            self.work.commit(f"forward-{index + 1:04d}", [name])
            steps.step(index + 1)

    def head(self, ids: torch.Tensor, seed: int) -> None:
        """Write ``gradient-<count>``: of the loss, with labels sampled from the model, by what the last layer gave."""
        if self.work.finished("gradient") is not None:
            return
        shape = (*ids.shape, self.skeleton.config.hidden_size)
        count = self.skeleton.count
        last = reopened(self.work.required(f"forward-{count:04d}", f"input-{count:04d}"), shape)
        name = f"gradient-{count:04d}"
        gradients = mapped(self.work.temporary(name), shape)
        head = self.skeleton.scratch.float32("head", self.skeleton.weights.tensor(self.skeleton.head_name))
        torch.manual_seed(seed)
        with self.skeleton.norm() as norm:
            for window, state in enumerate(last):
                leaf = state[None].clone().requires_grad_(True)
                normed = norm(leaf)
                loss = self._loss_gradient(normed.detach(), head)
                gradients[window] = torch.autograd.grad(normed, leaf, loss)[0][0]
        self.work.commit("gradient", [name])

    def _loss_gradient(self, normed: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Gradient [1, tokens, hidden] of the summed cross entropy against labels drawn from the model itself."""
        labels = self._sampled(normed, head)
        result = torch.empty_like(normed)
        for piece in _positions(normed, head):
            leaf = normed[:, piece].clone().requires_grad_(True)
            logits = torch.nn.functional.linear(leaf, head)[0]
            loss = torch.nn.functional.cross_entropy(logits, labels[piece], reduction="sum")
            result[:, piece] = torch.autograd.grad(loss, leaf)[0]
        return result

    def _sampled(self, normed: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """One label for each position: what ``torch.multinomial`` draws, without its copies in memory.

        The random numbers are drawn for all positions at once, so the labels do not depend on the pieces.
        """
        noise = self.skeleton.scratch.zeros("noise", (normed.shape[1], head.shape[0])).exponential_(1)
        labels = torch.empty(normed.shape[1], dtype=torch.int64)
        for piece in _positions(normed, head):
            odds = torch.nn.functional.linear(normed[:, piece], head)[0].softmax(-1)
            labels[piece] = torch.div(odds, noise[piece], out=odds).argmax(-1)
        return labels

    def backward(self, index: int, shape: tuple[int, ...], config: CalibratedGptqOptions) -> Scores:
        """Recompute one layer with gradients; returns its matrices' scores and writes the gradient for its input."""
        count = self.skeleton.count
        inputs = reopened(self.work.required(f"forward-{index:04d}", f"input-{index:04d}"), shape)
        after = "gradient" if index + 1 == count else f"backward-{index + 1:04d}"
        incoming = reopened(self.work.required(after, f"gradient-{index + 1:04d}"), shape)
        name = f"gradient-{index:04d}"
        outgoing = mapped(self.work.temporary(name), shape)
        with self.skeleton.layer(index) as layer:
            fisher = self._watch(index)
            for window, (state, gradient) in enumerate(zip(inputs, incoming, strict=True)):
                leaf = state[None].clone().requires_grad_(True)
                torch.autograd.backward(call(layer, leaf, self.arguments[index]), gradient[None])
                outgoing[window] = _taken(leaf)[0]
            scores = {
                f"model.layers.{index}.{matrix}": {
                    "gain": self._gain(module.weight.detach(), fisher[matrix], config),
                    "size": module.weight.numel(),
                }
                for matrix, module in self.skeleton.linears(index).items()
            }
        self.work.commit(f"backward-{index:04d}", [name], scores)
        for done in range(index + 1, count + 1):
            self.forget(done)
        return scores

    def _watch(self, index: int) -> dict[str, torch.Tensor]:
        """Sums of squared gradients of the layer's matrices; each gradient is dropped as soon as it is added."""
        fisher: dict[str, torch.Tensor] = {}

        def add(name: str, weight: torch.Tensor) -> None:
            gradient = _taken(weight)
            for piece in row_pieces(*weight.shape):
                fisher[name][piece] += gradient[piece] ** 2

        for name, module in self.skeleton.linears(index).items():
            fisher[name] = self.skeleton.scratch.zeros(f"fisher.{name}", tuple(module.weight.shape))
            module.weight.requires_grad_(True)
            module.weight.register_post_accumulate_grad_hook(partial(add, name))  # type: ignore[no-untyped-call]
        return fisher

    def _gain(self, weight: torch.Tensor, fisher: torch.Tensor, config: CalibratedGptqOptions) -> float:
        delta = self.skeleton.scratch.zeros("delta", tuple(weight.shape))
        for piece in row_pieces(*weight.shape):
            rows = weight[piece]
            grid = round_to_nearest(rows, config.bits, config.group_size, config.symmetric)
            delta[piece] = grid.dequantize() - rows
        # row by row first: a sum over all at once depends on the number of threads
        return float(delta.pow_(2).mul_(fisher).sum(1).sum())


def _taken(leaf: torch.Tensor) -> torch.Tensor:
    """The gradient of a leaf, which lets go of it."""
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None
    return gradient


def _positions(normed: torch.Tensor, head: torch.Tensor) -> Iterator[slice]:
    """Slices of positions whose logits fit into one piece."""
    tokens, step = normed.shape[1], max(LOGITS_PIECE // head.shape[0], 1)
    yield from (slice(begin, min(begin + step, tokens)) for begin in range(0, tokens, step))
