"""Gradients of a model's loss by its hidden states, one decoder layer in memory at a time.

Forward through the layers keeping each one's input in a file, then backward with recomputation: load a layer, run it
again with gradients, push the incoming gradient through (Chen et al. 2016, arXiv:1604.06174). What a caller makes of
one layer's gradients is finished before the next layer is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qwen_onnx.catalog.costs import LOGITS_PIECE
from qwen_onnx.export.progress import Steps
from qwen_onnx.export.skeleton import Skeleton, call
from qwen_onnx.export.weights import mapped, reopened
from qwen_onnx.export.workfolder import WorkFolder

# what a caller keeps of a layer: facts for the record of the step, and files besides the gradient
Kept = tuple[dict[str, Any], list[str]]


@dataclass(frozen=True)
class Gradients:
    """One run, forward and backward; every finished layer is a step of ``work``.

    Args:
        arguments: what each layer is called with besides the hidden states, for a single window.
        what: what its lines of progress begin with.
        together: windows that run through a layer at once. One, where the caller squares a window's gradients.
    """

    skeleton: Skeleton
    arguments: list[dict[str, Any]]
    work: WorkFolder
    what: str
    together: int = 1

    def forget(self, index: int) -> None:
        """The input of layer ``index`` and the gradient for it are not needed any more."""
        self.work.release(f"forward-{index:04d}", f"input-{index:04d}")
        step = "gradient" if index == self.skeleton.count else f"backward-{index:04d}"
        self.work.release(step, f"gradient-{index:04d}")

    def run(self, ids: torch.Tensor, seed: int, watch: Callable[[int], Callable[[], Kept]]) -> list[dict[str, Any]]:
        """Everything, from where an earlier run stopped.

        Args:
            ids: [windows, tokens].
            seed: of the labels.
            watch: called with a layer's number while the layer is loaded, before its first window; what it returns
                is called after the last one.

        Returns:
            What ``watch`` kept of each layer, in the order of the layers.
        """
        self.forward(ids)
        self.head(ids, seed)
        count, shape = self.skeleton.count, (*ids.shape, self.skeleton.config.hidden_size)
        kept: dict[int, dict[str, Any]] = {}
        steps = Steps(f"{self.what}: backward through layer", count)
        for index in reversed(range(count)):
            known = self.work.finished(f"backward-{index:04d}")
            if known is None:
                known = self.backward(index, shape, watch)
                steps.step(count - index)
            kept[index] = known
        for index in range(count + 1):
            self.forget(index)
        return [kept[index] for index in range(count)]

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
        steps = Steps(f"{self.what}: forward through layer", count)
        for index in range(count):
            if self.work.finished(f"forward-{index + 1:04d}") is not None:
                continue
            name = f"input-{index + 1:04d}"
            before = reopened(self.work.required(f"forward-{index:04d}", f"input-{index:04d}"), shape)
            states = mapped(self.work.temporary(name), shape)
            with self.skeleton.layer(index) as layer, torch.no_grad():
                for windows in self._batches(len(before)):
                    states[windows] = call(layer, before[windows], self.arguments[index])
            self.work.commit(f"forward-{index + 1:04d}", [name])
            steps.step(index + 1)

    def normed(self, ids: torch.Tensor) -> torch.Tensor:
        """What the head sees [windows, tokens, hidden], while the states of ``forward`` are kept."""
        count, shape = self.skeleton.count, (*ids.shape, self.skeleton.config.hidden_size)
        last = reopened(self.work.required(f"forward-{count:04d}", f"input-{count:04d}"), shape)
        result = self.skeleton.scratch.zeros("normed", shape)
        with self.skeleton.norm() as norm, torch.no_grad():
            for window, state in enumerate(last):
                result[window] = norm(state)
        return result

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
                loss = _loss_gradient(normed.detach()[0], head)
                gradients[window] = torch.autograd.grad(normed, leaf, loss[None])[0][0]
        self.work.commit("gradient", [name])

    def backward(
        self, index: int, shape: tuple[int, ...], watch: Callable[[int], Callable[[], Kept]]
    ) -> dict[str, Any]:
        """Recompute one layer with gradients; writes the gradient for its input, returns what ``watch`` kept."""
        count = self.skeleton.count
        inputs = reopened(self.work.required(f"forward-{index:04d}", f"input-{index:04d}"), shape)
        after = "gradient" if index + 1 == count else f"backward-{index + 1:04d}"
        incoming = reopened(self.work.required(after, f"gradient-{index + 1:04d}"), shape)
        name = f"gradient-{index:04d}"
        outgoing = mapped(self.work.temporary(name), shape)
        with self.skeleton.layer(index) as layer:
            result = watch(index)
            for windows in self._batches(len(inputs)):
                leaf = inputs[windows].clone().requires_grad_(True)
                torch.autograd.backward(call(layer, leaf, self.arguments[index]), incoming[windows])
                outgoing[windows] = taken(leaf)
            facts, files = result()
        self.work.commit(f"backward-{index:04d}", [name, *files], facts)
        for done in range(index + 1, count + 1):
            self.forget(done)
        return facts

    def _batches(self, windows: int) -> Iterator[slice]:
        yield from (slice(begin, begin + self.together) for begin in range(0, windows, self.together))


def taken(leaf: torch.Tensor) -> torch.Tensor:
    """The gradient of a leaf, which lets go of it."""
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None
    return gradient


def _loss_gradient(normed: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Gradient of the summed cross entropy against labels drawn from the model itself.

    A label is where a random number falls in the summed odds of all tokens. The numbers are drawn for all positions
    at once, so the labels do not depend on the pieces.

    Args:
        normed: [tokens, hidden], what the head sees.
        head: [vocabulary, hidden].

    Returns:
        [tokens, hidden].
    """
    drawn = torch.rand(len(normed), 1)
    result = torch.empty_like(normed)
    for piece in _positions(normed, head):
        odds = torch.nn.functional.linear(normed[piece], head).softmax(-1)
        summed = odds.cumsum(-1)
        labels = torch.searchsorted(summed, drawn[piece] * summed[:, -1:], right=True).clamp_(max=len(head) - 1)
        # the loss by the logits is what the model gives less what was drawn: no logits are computed twice
        result[piece] = odds.scatter_add_(1, labels, torch.full_like(drawn[piece], -1.0)) @ head
    return result


def _positions(normed: torch.Tensor, head: torch.Tensor) -> Iterator[slice]:
    """Slices of positions whose logits fit into one piece."""
    tokens, step = len(normed), max(LOGITS_PIECE // head.shape[0], 1)
    yield from (slice(begin, min(begin + step, tokens)) for begin in range(0, tokens, step))
