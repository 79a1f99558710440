"""The number of weights that a config.json describes, against PyTorch's and against the catalogue's."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_onnx.catalog.architectures import DENSE, MIXTURES
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.schema import Shape
from qwen_onnx.catalog.sizes import shape_of
from qwen_onnx.catalog.weights import count_weights
from tests.fixtures.architectures import MAKERS


@pytest.mark.parametrize("architecture", MAKERS)
def test_as_many_as_pytorch_has(architecture: str) -> None:
    with torch.device("meta"):
        model = MAKERS[architecture]()
    # the text model alone: no images, no head that drafts
    counted = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if "visual" not in name and not name.startswith("mtp")
    }
    config: dict[str, Any] = {**model.config.to_dict(), "architectures": [architecture]}
    assert count_weights(config, architecture, shape_of(config)) == sum(counted.values())


def test_layers_of_a_mixture_may_be_dense() -> None:
    config = {"mlp_only_layers": [0], "decoder_sparse_step": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "heads": 4, "kv_heads": 2, "vocab_size": 64, "tied": True}
    sizes |= {"experts": 8, "moe_intermediate_size": 16}
    counts = [
        count_weights(config, "Qwen3MoeForCausalLM", Shape.model_validate(sizes | {"layers": layers}))
        for layers in (1, 2, 3, 4)
    ]
    dense, mixed = 3 * 32 * 48, 32 * 8 + 3 * 8 * 32 * 16
    steps = [after - before for before, after in itertools.pairwise(counts)]
    assert steps[0] - steps[1] == mixed - dense
    assert steps[2] == steps[0], "every second layer has experts"


def test_as_many_as_the_catalogue_says(repository: Path) -> None:
    compared = 0
    for family, row in load_catalog(repository).rows.values():
        shape = row.shape
        known = all((shape.layers, shape.hidden_size, shape.heads, shape.kv_heads, shape.vocab_size))
        inner = shape.intermediate_size if family.architecture in DENSE else shape.moe_intermediate_size
        if not known or not inner or shape.tied is None or family.architecture not in DENSE | MIXTURES:
            continue
        # "0.5B" is all that some cards say
        if not row.parameters or row.parameters % 10_000_000 == 0:
            continue
        assert count_weights({}, family.architecture, shape) == row.parameters, row.id
        compared += 1
    assert compared > 60
