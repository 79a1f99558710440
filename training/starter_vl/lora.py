"""The language model's matrices of attention, each with a learned part of low rank beside what it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

RANK = 8
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
# of a tensor in the tower's file, as peft names it
NAMED = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"


class Halved(torch.autograd.Function):
    """x Wᵀ in bfloat16, of a W that does not learn: twice as fast as float32 on processors with AVX-512."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor) -> Tensor:
        """Shapes [tokens, in], [out, in] to [tokens, out]."""
        ctx.save_for_backward(weight)
        return (value.to(torch.bfloat16) @ weight.T).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """See torch."""
        [weight] = ctx.saved_tensors
        return (gradients[0].to(torch.bfloat16) @ weight).float(), None


class Frozen(nn.Module):
    """A matrix that does not learn, with or without a part of low rank that does."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight = linear.weight.detach().to(torch.bfloat16)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.low: Low | None = Low(linear.in_features, linear.out_features, rank) if rank else None

    def forward(self, value: Tensor) -> Tensor:
        """[…, in] to […, out]."""
        flat = value.flatten(0, -2)
        found: Tensor = Halved.apply(flat, self.weight)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            found = found + self.bias
        if self.low is not None:
            found = found + self.low(flat)
        return found.view(*value.shape[:-1], -1)


class Low(nn.Module):
    """B A x; nothing at first."""

    def __init__(self, inner: int, outer: int, rank: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(rank, inner) * inner**-0.5), nn.Parameter(torch.zeros(outer, rank))

    def forward(self, value: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out]."""
        return (value @ self.a.T) @ self.b.T


def adapt(layers: nn.ModuleList, rank: int = RANK) -> nn.ModuleDict:
    """Put ``Frozen`` in place of the matrices of ``layers``, and return what learns of them, by layer and name."""
    learned = nn.ModuleDict()
    for index, layer in enumerate(layers):
        for part in (layer.get_submodule("self_attn"), layer.get_submodule("mlp")):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    frozen = Frozen(linear, rank if name in ADAPTED else 0)
                    setattr(part, name, frozen)
                    if frozen.low is not None:
                        learned[f"{index}-{name}"] = frozen.low
    return learned


def adapter_weights(learned: nn.ModuleDict) -> dict[str, Tensor]:
    """By name in the tower's file, in half precision."""
    found = {}
    for key, low in learned.items():
        index, name = key.split("-")
        for part, value in (("A", low.get_parameter("a")), ("B", low.get_parameter("b"))):
            found[NAMED.format(index, name, part)] = value.detach().to(torch.float16).contiguous()
    return found
