"""FP8 checkpoints in blocks with scales: dequantised to bfloat16, or refused with the tensor that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import Plan, make_plan
from qwen_onnx.errors import SourceError, UnsupportedModelError
from qwen_onnx.sources.checkpoint import INDEX_FILE
from qwen_onnx.sources.fetch import fetch, importers, weights_of
from qwen_onnx.sources.own import choose
from tests.conftest import make_tiny_checkpoint, rewrite_json

BLOCK = (48, 32)  # 64 and 128 rows do not divide by it: the last block is cut off
SETTINGS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
Tensors = dict[str, torch.Tensor]


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As Qwen's own FP8 checkpoints: the largest of a block becomes 448."""
    rows, columns = (-(-size // side) for size, side in zip(weight.shape, BLOCK, strict=True))
    scales = torch.empty(rows, columns)
    coded = torch.empty(weight.shape)
    for row in range(rows):
        for column in range(columns):
            place = slice(row * BLOCK[0], (row + 1) * BLOCK[0]), slice(column * BLOCK[1], (column + 1) * BLOCK[1])
            scales[row, column] = weight[place].abs().max() / 448
            coded[place] = weight[place] / scales[row, column]
    return coded.to(torch.float8_e4m3fn), scales


def write(folder: Path, tensors: Tensors, shards: int) -> None:
    names = sorted(tensors)
    groups = [names[index::shards] for index in range(shards)]
    files = ["model.safetensors"] if shards == 1 else [f"model-{n}.safetensors" for n in range(shards)]
    (folder / "model.safetensors").unlink(missing_ok=True)
    for file, group in zip(files, groups, strict=True):
        save_file({name: tensors[name] for name in group}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        where = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.fixture
def original(tmp_path: Path) -> tuple[Path, Tensors, Tensors]:
    """A folder, its weights before, and in FP8 with their scales."""
    folder = make_tiny_checkpoint(tmp_path / "tiny-fp8", kind="qwen3")
    plain = load_file(folder / "model.safetensors")
    coded: Tensors = {}
    for name, tensor in plain.items():
        if "_proj" in name:
            coded[name], coded[f"{name}_scale_inv"] = quantise(tensor.float())
        else:
            coded[name] = tensor.to(torch.bfloat16)
    rewrite_json(folder / "config.json", quantization_config=SETTINGS, dtype="bfloat16")
    return folder, plain, coded


def plan_for(folder: Path, repository: Path) -> Plan:
    found = choose(load_catalog(repository), str(folder), folder, lambda _: None)
    return make_plan(found.catalog, found.model, "cpu")


def all_of(folder: Path) -> Tensors:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("shards", [1, 3])
def test_it_becomes_bfloat16(
    original: tuple[Path, Tensors, Tensors], repository: Path, tmp_path: Path, shards: int
) -> None:
    folder, plain, coded = original
    write(folder, coded, shards)
    plan = plan_for(folder, repository)
    assert plan.quantization == "fp8"
    assert importers(plan, folder) == ("qwen_onnx.sources.fp8",)
    said: list[str] = []
    found = fetch(plan, tmp_path / "cache", local=folder, progress=said.append)
    assert said == ["dequantising FP8 to bfloat16"]
    assert found.origin == "folder tiny-fp8"
    assert set(weights_of(found.files)) == {path.name for path in folder.glob("*.safetensors")}
    made = all_of(found.path)
    assert made.keys() == plain.keys()
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    for name, tensor in plain.items():
        # three bits of mantissa are 1/16 of the number; the smallest are subnormal, 2^-9 of 448 their step
        near = tensor.abs() / 15 + tensor.abs().max() / 448 / 256
        assert bool(((made[name].float() - tensor).abs() <= near).all()), name
        assert not name.startswith("model.layers") or not torch.equal(made[name].float(), torch.zeros_like(tensor))
    config = json.loads((found.path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert fetch(plan, tmp_path / "cache", local=folder, progress=said.append) == found
    assert len(said) == 1, "it is kept"


def test_each_number_is_code_times_scale(
    original: tuple[Path, Tensors, Tensors], repository: Path, tmp_path: Path
) -> None:
    folder, _, coded = original
    write(folder, coded, 1)
    made = all_of(fetch(plan_for(folder, repository), tmp_path / "cache", local=folder, progress=lambda _: None).path)
    name = "model.layers.1.mlp.gate_proj.weight"
    code, scale = coded[name].float(), coded[f"{name}_scale_inv"]
    for row, column in ((0, 0), (47, 31), (48, 32), (127, 63)):
        expected = (code[row, column] * scale[row // BLOCK[0], column // BLOCK[1]]).to(torch.bfloat16)
        assert made[name][row, column] == expected


def test_pytorch_reads_it(original: tuple[Path, Tensors, Tensors], repository: Path, tmp_path: Path) -> None:
    from transformers import Qwen3ForCausalLM

    folder, plain, coded = original
    write(folder, coded, 1)
    found = fetch(plan_for(folder, repository), tmp_path / "cache", local=folder, progress=lambda _: None)
    model = Qwen3ForCausalLM.from_pretrained(found.path, trust_remote_code=False)
    loaded = model.model.layers[0].mlp.up_proj.weight.detach().float()
    assert torch.allclose(loaded, plain["model.layers.0.mlp.up_proj.weight"].float(), atol=3e-3)


def _drop(tensors: Tensors) -> None:
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]


def _orphan(tensors: Tensors) -> None:
    tensors["model.layers.9.mlp.up_proj.weight_scale_inv"] = torch.ones(1, 1)


def _reshape(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(2, 2)


def _spoil(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"][0, 0] = float("nan")


def _flat(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = torch.ones(64).to(torch.float8_e4m3fn)
    tensors["model.norm.weight_scale_inv"] = torch.ones(2)


def _whole(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int32)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_drop, "the weight has no scale_inv"),
        (_orphan, "a scale belongs to no weight"),
        (_reshape, r"its scales are \[2, 2\]"),
        (_spoil, "NaN or infinity"),
        (_flat, "its scales are"),
        (_whole, "type I32 are not read"),
    ],
)
def test_scales_that_do_not_fit(
    original: tuple[Path, Tensors, Tensors],
    repository: Path,
    tmp_path: Path,
    spoil: Callable[[Tensors], Any],
    words: str,
) -> None:
    folder, _, coded = original
    spoil(coded)
    write(folder, coded, 1)
    plan = plan_for(folder, repository)
    with pytest.raises(SourceError, match=words) as caught:
        fetch(plan, tmp_path / "cache", local=folder, progress=lambda _: None)
    assert caught.value.where
    assert not any((tmp_path / "cache").rglob("*.safetensors")), "nothing half done is kept"


def test_a_recipe_of_another_storage_is_not_followed(
    original: tuple[Path, Tensors, Tensors], repository: Path, tmp_path: Path
) -> None:
    folder, plain, coded = original
    write(folder, coded, 1)
    plan = plan_for(folder, repository)
    with pytest.raises(UnsupportedModelError, match="quantised, the recipe says otherwise") as caught:
        fetch(plan.model_copy(update={"quantization": None}), tmp_path, local=folder, progress=lambda _: None)
    assert "qwen-onnx optimize ./tiny-fp8" in (caught.value.hint or "")
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    rewrite_json(folder / "config.json", quantization_config=None)
    with pytest.raises(UnsupportedModelError, match="not quantised, the recipe says otherwise"):
        fetch(plan, tmp_path, local=folder, progress=lambda _: None)
