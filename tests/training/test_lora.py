"""Matrices with a learned part beside them: what trains is what the file holds and the merge adds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.starter_vl.lora import RANK, adapt, adapter_weights


def layer() -> nn.ModuleDict:
    attention = nn.ModuleDict({"q_proj": nn.Linear(64, 32), "o_proj": nn.Linear(64, 32, bias=False)})
    return nn.ModuleDict({"self_attn": attention, "mlp": nn.ModuleDict({"up_proj": nn.Linear(64, 32)})})


@pytest.fixture
def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    made = nn.ModuleList([layer(), layer()])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return made.requires_grad_(False)


def learn(learned: nn.ModuleDict) -> None:
    with torch.no_grad():
        for low in learned.values():
            low.get_parameter("b").normal_()


def test_nothing_changes_before_it_learns_and_then_by_what_the_file_holds(layers: nn.ModuleList) -> None:
    value = torch.randn(2, 5, 64).to(torch.bfloat16).float()
    before = layers[1].get_submodule("self_attn.q_proj")(value)
    learned = adapt(layers)
    adapted = layers[1].get_submodule("self_attn.q_proj")
    assert torch.allclose(adapted(value), before, atol=0.02)
    learn(learned)
    saved = adapter_weights(learned)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    a, b = (saved[name.format(part)].float() for part in "AB")
    assert (a.shape, b.shape) == ((RANK, 64), (32, RANK))
    merged = before + value @ (b @ a).T
    assert float((merged - before).abs().max()) > 1
    assert torch.allclose(adapted(value), merged, atol=0.05)
    assert len(saved) == 2 * 2 * 2


def test_its_gradient_is_that_of_the_merged_matrix(layers: nn.ModuleList) -> None:
    value = torch.randn(3, 64).to(torch.bfloat16).float().requires_grad_()
    weight = layers[0].get_parameter("self_attn.o_proj.weight").clone()
    learned = adapt(layers)
    learn(learned)
    a, b = (learned["0-o_proj"].get_parameter(part) for part in "ab")
    (found,) = torch.autograd.grad(layers[0].get_submodule("self_attn.o_proj")(value).sum(), value)
    assert torch.allclose(found, (weight + b @ a).sum(0).expand(3, -1), rtol=0.02, atol=0.02)
    assert [name for name, one in layers.named_parameters() if one.requires_grad] == [
        f"{index}.self_attn.{matrix}.low.{side}" for index in "01" for matrix in ("q_proj", "o_proj") for side in "ab"
    ]
