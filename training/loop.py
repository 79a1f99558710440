"""The loop that all trainings share: rates, states that are saved and gone on from, and optimisers."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

SAVED_EVERY = 10
WORDS_TABLE = "words.table"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast something learns.

    Attributes:
        faster: how much faster the words learn than all else.
    """

    name: str
    steps: int
    batch: int
    rate: float
    warm: int
    faster: float = 1.0

    def rate_at(self, step: int) -> float:
        """Rises, stays, and falls in the second half."""
        return self.rate * min(1.0, (step + 1) / self.warm, max(0.02, 2 * (1 - step / self.steps)))


# of a step: the loss, and what to show of it
Judged = tuple[Tensor, dict[str, float]]


def run(stage: Schedule, learned: nn.Module, work: Path, loss_of: Callable[[int], Judged]) -> None:
    """All steps of a stage; ``loss_of`` a step gives the loss and what to show of it."""
    file = work / f"{stage.name}.pt"
    parameters = list(learned.parameters())
    optimisers = optimisers_of(learned, stage)
    first, shown, begun = 0, defaultdict[str, float](float), time.monotonic()
    if file.exists():
        state = torch.load(file, weights_only=True)
        first = state["step"]
        learned.load_state_dict(state["learned"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
    for step in range(first, stage.steps):
        loss, told = loss_of(step)
        learned.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        _mean_of_all(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = stage.rate_at(step) * group.get("faster", 1.0)
            optimiser.step()
        for name, value in told.items():
            shown[name] = 0.9 * shown[name] + 0.1 * value if name in shown else value
        done = step + 1
        if rank() == 0 and (done % SAVED_EVERY == 0 or done == stage.steps):
            saved = [optimiser.state_dict() for optimiser in optimisers]
            state = {"step": done, "learned": learned.state_dict(), "optimisers": saved}
            torch.save(state, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
        if rank() == 0 and (done % 5 == 0 or done == stage.steps):
            left = (time.monotonic() - begun) / (done - first) * (stage.steps - done)
            figures = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
            print(f"{stage.name} {done}/{stage.steps}  {left / 60:.0f} min left  {figures}", flush=True)


def rank() -> int:
    """Which of the processes this is, of those that share a stage's batches."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def _mean_of_all(parameters: Sequence[nn.Parameter]) -> None:
    """Gradients become the mean of those of all processes."""
    if distributed.is_initialized():
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(together)
        together /= distributed.get_world_size()
        first = 0
        for gradient in gradients:
            gradient.copy_(together[first : first + gradient.numel()].view_as(gradient))
            first += gradient.numel()


def optimisers_of(learned: nn.Module, stage: Schedule) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside a tower, AdamW for everything else."""
    found = dict(learned.named_parameters())
    hidden = sorted(
        name
        for name in found
        if (".blocks." in name or ".layers." in name) and name.endswith("weight") and found[name].ndim == 2
    )
    words = [value for name, value in found.items() if name == WORDS_TABLE]
    others = [value for name, value in found.items() if name != WORDS_TABLE and name not in hidden]
    groups: list[dict[str, Any]] = [{"params": others}]
    if words:
        groups.append({"params": words, "faster": stage.faster})
    answer: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.97), weight_decay=0.0)
    ]
    if hidden:
        matrices = [found[name] for name in hidden]
        answer.append(torch.optim.Muon(matrices, lr=stage.rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return answer


def learned_by(stage: Schedule, work: Path) -> dict[str, Tensor]:
    """What a stage has learned up to now."""
    found: dict[str, Tensor] = torch.load(work / f"{stage.name}.pt", weights_only=True)["learned"]
    return found


def start_processes(threads: int) -> None:
    """Join the others where torchrun started several of this program."""
    torch.set_num_threads(threads)
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("gloo")
