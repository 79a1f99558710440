"""The experts of a layer, each by the tokens that were routed to it, all on one grid.

The operator QMoE has one block size for all experts of a layer. Its codes have 4 bits: of 8 it rounds activations at
every accuracy level, so that no such graph could be compared with PyTorch (docs/lab-log.md, 2026-11-29).

Kept of the windows are the tokens, not a Hessian of each expert: that takes room by the tokens, whatever the number of
experts, and one expert's Hessian is in memory while it is solved.
"""

from __future__ import annotations

from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qwen_onnx.export.experts import CODED, STACKED
from qwen_onnx.export.passes.fisher_gptq.options import BLOCK, FisherGptqOptions
from qwen_onnx.export.passes.fisher_gptq.solver import Grid, damage, damped, on_grids, stored_bytes
from qwen_onnx.export.passes.fisher_gptq.statistics import add_products, mirror
from qwen_onnx.export.progress import progress
from qwen_onnx.export.weights import Scratch, create_safetensors

# most bits first: finer blocks
GRIDS = tuple(Grid(4, block) for block in (BLOCK, BLOCK // 2, BLOCK // 4))
# an expert that saw fewer tokens than its matrix has inputs, divided by this, is told of
NEARLY_NONE = 8
# with fewer tokens for each input GPTQ fits those that it saw at the cost of all others: docs/lab-log.md
ENOUGH, OTHERS = 4, 0.25


class Seen(NamedTuple):
    """What a matrix of an expert is solved by.

    Attributes:
        states: [tokens, in], what it reads.
        counts: [tokens], what each counts.
        squares: [out], sum of the squared gradients at each output.
    """

    states: torch.Tensor
    counts: torch.Tensor
    squares: torch.Tensor


class RoutedTokens:
    """Takes the place of a layer's experts while windows run through it, forward and backward, and keeps what they see.

    Args:
        experts: module of transformers, filled.
        scratch: for what the experts read.
        tokens: of all windows.
        chosen: experts that a token goes to.
    """

    def __init__(self, experts: torch.nn.Module, scratch: Scratch, tokens: int, chosen: int) -> None:
        self.experts, self.chosen = experts, chosen
        self._activate: torch.nn.Module = experts.get_submodule("act_fn")
        self.weights: dict[str, torch.Tensor] = {name: experts.get_parameter(name) for name in STACKED}
        count, outputs, hidden = self.weights[STACKED[0]].shape
        self.count = count
        self.inputs = scratch.empty("experts.inputs", (tokens, hidden))
        self.inner = scratch.empty("experts.inner", (tokens * chosen, outputs // 2))
        # of each choice of a token
        self.owner = torch.zeros(tokens * chosen, dtype=torch.int64)
        self.counts = {name: torch.zeros(tokens * chosen) for name in STACKED}
        self.squares = {STACKED[0]: torch.zeros(count, outputs), STACKED[1]: torch.zeros(count, hidden)}
        self._begun = 0
        experts.forward = self._forward

    def _forward(self, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """What the module computes.

        Args:
            hidden: [tokens, hidden].
            chosen, shares: [tokens, chosen], the experts of each token and what they count.
        """
        begin, self._begun = self._begun, self._begun + len(hidden)
        self.inputs[begin : self._begun] = hidden.detach()
        self.owner[begin * self.chosen : self._begun * self.chosen] = chosen.flatten()
        result = torch.zeros_like(hidden)
        for expert in torch.unique(chosen).tolist():
            token, place = torch.where(chosen == expert)
            choices = (begin + token) * self.chosen + place
            both, inner = self._inner(expert, hidden[token])
            out = torch.nn.functional.linear(inner, self.weights[STACKED[1]][expert])
            self.inner[choices] = inner.detach()
            for name, tensor in zip(STACKED, (both, out), strict=True):
                tensor.register_hook(partial(self._note, name, expert, choices))  # type: ignore[no-untyped-call]
            result = result.index_add(0, token, out * shares[token, place, None])
        return result

    def _inner(self, expert: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up of one expert, and what its second matrix reads."""
        both = torch.nn.functional.linear(states, self.weights[STACKED[0]][expert])
        gate, up = both.chunk(2, dim=-1)
        return both, self._activate(gate) * up

    def _note(self, name: str, expert: int, choices: torch.Tensor, gradient: torch.Tensor) -> None:
        squared = gradient.square()
        self.squares[name][expert] += squared.sum(0)
        self.counts[name][choices] = squared.sum(1).sqrt_()

    def seen(self, name: str, expert: int) -> Seen:
        """What one matrix of ``STACKED`` saw.

        Where an expert saw fewer than ``ENOUGH`` tokens for each input, others of the layer, evenly drawn, stand in for
        what is lacking; such a token counts ``OTHERS`` times what the expert's own do on average.
        """
        own = torch.where(self.owner == expert)[0]
        counts, states = self.counts[name][own], self._states(name, own)
        lacking = min(max(ENOUGH * states.shape[1] - len(own), 0), len(self.inputs))
        if lacking:
            drawn = self.inputs[torch.arange(lacking) * len(self.inputs) // lacking]
            others = drawn if name == STACKED[0] else self._inner(expert, drawn)[1]
            count = OTHERS * float(counts.double().mean()) if len(own) else 0.0
            states, counts = torch.cat([states, others]), torch.cat([counts, torch.full((lacking,), count or 1.0)])
        return Seen(states, counts, self.squares[name][expert])

    def _states(self, name: str, choices: torch.Tensor) -> torch.Tensor:
        return self.inputs[choices // self.chosen] if name == STACKED[0] else self.inner[choices]

    def solved(self, path: Path, pool: Executor, config: FisherGptqOptions, where: str) -> list[dict[str, Any]]:
        """Write all experts on every grid, as ``<grid>|<matrix>.<part>``; the bytes and the damage of each grid.

        The module computes itself again afterwards.
        """
        del self.experts.forward
        least = self.inputs.shape[1] // NEARLY_NONE
        few = int((torch.bincount(self.owner, minlength=self.count) < least).sum())
        if few:
            progress(f"{where}: {few} of {self.count} experts saw fewer than {least} tokens, others stand in")
        sizes = {name: (self.count, *weight.shape[1:]) for name, weight in self.weights.items()}
        files = create_safetensors(path, {key: form for grid in GRIDS for key, form in _layout(grid, sizes).items()})
        jobs = [(name, expert) for name in STACKED for expert in range(self.count)]
        totals = dict.fromkeys(GRIDS, 0.0)
        for harms in pool.map(lambda job: self._solve(job[0], job[1], files, config), jobs):
            for grid, harm in zip(GRIDS, harms, strict=True):
                totals[grid] += harm
        matrices = [weight.flatten(0, 1) for weight in self.weights.values()]
        return [
            {
                "option": grid.name,
                "bytes": sum(stored_bytes(matrix, grid) for matrix in matrices),
                "planes": 0,
                "damage": totals[grid],
            }
            for grid in GRIDS
        ]

    @torch.no_grad()
    def _solve(self, name: str, expert: int, files: dict[str, torch.Tensor], config: FisherGptqOptions) -> list[float]:
        """Fill in one matrix of one expert; its damage on each grid."""
        # threads of its own would wait for those of the other experts
        torch.set_num_threads(1)
        weight, seen = self.weights[name][expert].detach(), self.seen(name, expert)
        hessian = torch.zeros(weight.shape[1], weight.shape[1])
        add_products(hessian, seen.states, seen.counts)
        mirror(hessian)
        trusted = _trusted(hessian, seen.counts)
        found = on_grids(weight, damped(trusted, config.damp), GRIDS, config.refinements)
        for grid, one in zip(GRIDS, found, strict=True):
            for part, value in one.packed().items():
                files[f"{grid.name}|{name}.{part}"][expert] = value
        total = float(seen.squares.sum())
        # an expert that no token chose does no harm
        hessian.mul_(total / float(seen.counts.double().sum()))
        shares = seen.squares / max(total, torch.finfo(torch.float32).tiny)
        return [damage(one, weight, hessian, shares, len(self.inputs)) for one in found]


def _trusted(hessian: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """A copy whose parts off the diagonal count as the tokens do beside the inputs; of none, rounding is left.

    Errors that GPTQ moves to other inputs fit the tokens that it saw. With few for each input they harm all others.

    Args:
        hessian: [in, in].
        counts: [tokens]; unequal ones count as fewer tokens.
    """
    tokens = float(counts.double().sum() ** 2 / counts.double().square().sum())
    result = hessian * (tokens / (tokens + len(hessian)))
    result.diagonal().copy_(hessian.diagonal())
    return result


def _layout(grid: Grid, sizes: dict[str, tuple[int, ...]]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, (count, rows, inputs) in sizes.items():
        blocks = inputs // grid.block
        widths = (inputs * grid.bits // 8, blocks, -(-blocks * grid.bits // 8))
        for part, width in zip(CODED, widths, strict=True):
            dtype = torch.float32 if part == "scales" else torch.uint8
            found[f"{grid.name}|{name}.{part}"] = (dtype, (count, rows, width))
    return found
