"""What the loss says of a layer's matrices: which inputs count, and at which outputs.

Matrices that read the same input share a Hessian. Those that genai fuses (q, k and v) get one grid, solved as one.

A token counts by the root of its squared gradient: few tokens have most of the squares, and what fits these fits other
texts less (docs/lab-log.md, 2026-11-29).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qwen_onnx.export.passes.gptq.sensitivity import LEADER, ONE_PRECISION, named_as
from qwen_onnx.export.skeleton import Skeleton

# rows of a Hessian that are added to at once, from the diagonal on: what lies left of it is their mirror image
ROWS = 256


@dataclass(frozen=True)
class Unit:
    """Matrices of a layer that get one grid.

    Attributes:
        names: within the layer; their rows follow each other in what is solved.
        hessian: [in, in], Σ w·x·xᵀ over the tokens; w is the root of the squared gradient at all outputs that x leads
            to, times what makes Σ w the sum of the squares.
        shares: [out], each output's part of the squared gradients.
    """

    names: tuple[str, ...]
    hessian: torch.Tensor
    shares: torch.Tensor


class Watch:
    """Collects the statistics of one layer while windows run through it, forward and backward."""

    def __init__(self, skeleton: Skeleton, index: int) -> None:
        self.modules = skeleton.linears(index)
        groups = list(dict.fromkeys(named_as(name, LEADER) for name in self.modules))
        self.hessians = {
            group: skeleton.scratch.zeros(f"hessian.{group}", (self.modules[group].in_features,) * 2)
            for group in groups
        }
        # by group, the sum of what tokens count
        self._counts = dict.fromkeys(groups, 0.0)
        self.squares = {name: torch.zeros(module.out_features) for name, module in self.modules.items()}
        self._members = {group: [n for n in self.modules if named_as(n, LEADER) == group] for group in groups}
        self._pending: dict[str, list[torch.Tensor]] = {group: [] for group in groups}
        self._hooks = [
            module.register_forward_hook(self._hook(name, named_as(name, LEADER)))
            for name, module in self.modules.items()
        ]

    def _hook(self, name: str, group: str) -> Callable[..., None]:
        def forward(_: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            x = inputs[0].detach()
            add = partial(self._add, name, group, x)
            output.register_hook(add)  # type: ignore[no-untyped-call]

        return forward

    def _add(self, name: str, group: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        squared = gradient.reshape(-1, gradient.shape[-1]).square()
        self.squares[name] += squared.sum(0)
        waiting = self._pending[group]
        waiting.append(squared.sum(1))
        if len(waiting) < len(self._members[group]):
            return
        counts = torch.stack(waiting).sum(0).sqrt_()
        self._counts[group] += float(counts.double().sum())
        add_products(self.hessians[group], x.reshape(-1, x.shape[-1]), counts)
        waiting.clear()

    def units(self) -> list[Unit]:
        """What was collected; the hooks are gone afterwards."""
        for hook in self._hooks:
            hook.remove()
        for group, hessian in self.hessians.items():
            # a group that no token reached has nothing to scale
            hessian.mul_(float(self._total(group)) / (self._counts[group] or 1.0))
            mirror(hessian)
        units: dict[str, list[str]] = {}
        for name in self.modules:
            units.setdefault(named_as(name, ONE_PRECISION), []).append(name)
        return [self._unit(tuple(names)) for names in units.values()]

    def _unit(self, names: tuple[str, ...]) -> Unit:
        group = named_as(names[0], LEADER)
        total = self._total(group).clamp(min=torch.finfo(torch.float32).tiny)
        return Unit(names, self.hessians[group], torch.cat([self.squares[name] for name in names]) / total)

    def _total(self, group: str) -> torch.Tensor:
        """Sum of the squared gradients at all outputs of the group."""
        return torch.stack([self.squares[name].sum() for name in self._members[group]]).sum()


def _row_blocks(size: int) -> Iterator[slice]:
    yield from (slice(begin, min(begin + ROWS, size)) for begin in range(0, size, ROWS))


def mirror(hessian: torch.Tensor) -> None:
    """Fill in what ``add_products`` leaves out."""
    for rows in _row_blocks(len(hessian)):
        hessian[rows.stop :, rows] = hessian[rows, rows.stop :].T


def add_products(hessian: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor) -> None:
    """Add Σ w·x·xᵀ, save what lies left of the blocks on the diagonal.

    Args:
        hessian: [in, in].
        tokens: [tokens, in].
        counts: [tokens], what each token counts.
    """
    weighted = (tokens * counts[:, None]).T
    for rows in _row_blocks(len(hessian)):
        hessian[rows, rows.start :].addmm_(weighted[rows], tokens[:, rows.start :])
