"""Adapters are strangers' input; merging one is peft's own arithmetic."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import adapted, make_plan
from qwen_onnx.catalog.training import load_training
from qwen_onnx.errors import ChecksumError, QwenOnnxError, SourceError, UnsupportedModelError
from qwen_onnx.records import Verdict
from qwen_onnx.sources.adapter import (
    CONFIG,
    WEIGHTS,
    adapter_name,
    open_adapter,
)
from qwen_onnx.sources.checkpoint import check_checkpoint
from qwen_onnx.sources.fetch import fetch, folder_checksums, importers, weights_digest
from tests.conftest import REPOSITORY, rewrite_json
from tests.fixtures.adapters import RANK, sign_adapter

HIDDEN, NARROW, LAYERS = 64, 32, 2
NAME = "base_model.model.model.layers.{layer}.self_attn.{matrix}.lora_{part}.weight"


def _tensors(rank: int = RANK) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for layer in range(LAYERS):
        for matrix, outputs in (("q_proj", HIDDEN), ("v_proj", NARROW)):
            for part, shape in (("A", (rank, HIDDEN)), ("B", (outputs, rank))):
                name = NAME.format(layer=layer, matrix=matrix, part=part)
                found[name] = torch.randn(shape, generator=generator) / 10
    return found


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A plain LoRA of somebody else's for the tiny checkpoint."""
    folder = tmp_path / "Faq 1"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(_tensors(), folder / WEIGHTS)
    return folder


def _fetched(base: Path, folder: Path, cache: Path, given: Path | None) -> Any:
    plan = adapted(make_plan(load_catalog(REPOSITORY), "starter", "cpu"), open_adapter(folder).adapted())
    return fetch(plan, cache, local=base, adapter=given, progress=lambda _: None)


def test_the_merged_checkpoint_is_that_of_peft(tiny_checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    merged = _fetched(tiny_checkpoint, adapter, tmp_path / "cache", adapter)
    plan = make_plan(load_catalog(REPOSITORY), "starter", "cpu")
    check_checkpoint(merged.path, "Qwen2ForCausalLM", plan.shape)
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().state_dict()
    found = load_file(merged.path / "model.safetensors")
    plain = load_file(tiny_checkpoint / "model.safetensors")
    assert found.keys() == plain.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
        assert torch.equal(tensor, plain[name]) is not name.endswith(("q_proj.weight", "v_proj.weight"))


def test_what_was_merged_is_float32_and_what_was_not_stays(
    tiny_checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    half = Path(shutil.copytree(tiny_checkpoint, tmp_path / "half"))
    save_file(
        {name: tensor.bfloat16() for name, tensor in load_file(half / "model.safetensors").items()},
        half / "model.safetensors",
        {"format": "pt"},
    )
    rewrite_json(half / "config.json", dtype="bfloat16")
    merged = _fetched(half, adapter, tmp_path / "cache", adapter)
    kinds = {name: tensor.dtype for name, tensor in load_file(merged.path / "model.safetensors").items()}
    assert kinds["model.layers.1.self_attn.q_proj.weight"] is torch.float32
    assert kinds["model.layers.1.self_attn.k_proj.weight"] is torch.bfloat16
    assert json.loads((merged.path / "config.json").read_text())["dtype"] == "float32"


def test_a_plan_names_base_adapter_and_data(tiny_checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    weights = weights_digest(folder_checksums(tiny_checkpoint))
    sign_adapter(adapter, weights)
    plain = make_plan(load_catalog(REPOSITORY), "starter", "cpu")
    plan = adapted(plain, open_adapter(adapter).adapted())
    assert plan.adapter is not None
    assert (plan.adapter.weights, plan.adapter.data, plan.adapter.rank) == (weights, "d" * 64, RANK)
    assert (plan.name, plan.asked) == ("starter-faq/cpu-int4", "starter")
    assert "not in the catalogue" in plan.claim("PASS")
    assert plan.digest != plain.digest
    assert "adapter" not in plain.model_dump()
    assert "qwen_onnx.sources.merge" in importers(plan, None)
    # the merged checkpoint is found again without the adapter, and made only with it
    with pytest.raises(SourceError, match="the weights of the adapter faq are needed"):
        _fetched(tiny_checkpoint, adapter, tmp_path / "cache", None)
    once = _fetched(tiny_checkpoint, adapter, tmp_path / "cache", adapter)
    assert _fetched(tiny_checkpoint, adapter, tmp_path / "cache", None) == once


def test_an_adapter_of_another_base_is_refused(tiny_checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    sign_adapter(adapter, "0" * 64)
    with pytest.raises(UnsupportedModelError, match="trained on other weights"):
        _fetched(tiny_checkpoint, adapter, tmp_path / "cache", adapter)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("wrong", ["shape", "layer", "other"])
def test_an_adapter_that_does_not_fit_is_refused(
    tiny_checkpoint: Path, adapter: Path, tmp_path: Path, wrong: str
) -> None:
    tensors = _tensors()
    if wrong == "shape":
        tensors[NAME.format(layer=1, matrix="q_proj", part="A")] = torch.zeros(RANK, HIDDEN + 1)
    if wrong == "layer":
        for part, shape in (("A", (RANK, HIDDEN)), ("B", (HIDDEN, RANK))):
            tensors[NAME.format(layer=9, matrix="q_proj", part=part)] = torch.zeros(shape)
    if wrong == "other":
        tensors[NAME.format(layer=1, matrix="q_proj", part="B")] = torch.full((HIDDEN, RANK), float("inf"))
    save_file(tensors, adapter / WEIGHTS)
    told = {"shape": r"is for \[64, 65\]", "layer": "0 matrices", "other": "NaN or infinity"}[wrong]
    with pytest.raises(UnsupportedModelError, match=told):
        _fetched(tiny_checkpoint, adapter, tmp_path / "cache", adapter)
    assert not list((tmp_path / "cache").rglob("model.safetensors"))


def test_another_adapter_than_the_plans_is_refused(tiny_checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    save_file(_tensors() | {NAME.format(layer=0, matrix="q_proj", part="B"): torch.ones(HIDDEN, RANK)}, other / WEIGHTS)
    with pytest.raises(ChecksumError, match="not the adapter"):
        _fetched(tiny_checkpoint, adapter, tmp_path / "cache", other)


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite_json(folder / CONFIG, **changes)


def _weights(**tensors: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: save_file(_tensors() | tensors, folder / WEIGHTS)


def _file(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


FIRST = NAME.format(layer=0, matrix="q_proj", part="A")
BROKEN = {
    "pickle beside": (_file("adapter_model.bin", b"\x80"), "pickled files"),
    "pickle": (_file(WEIGHTS, b"\x80\x04" + b"\x00" * 99), "truncated or altered"),
    "truncated": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]), "truncated"),
    "flood": (_file(WEIGHTS, (1 << 40).to_bytes(8, "little")), "header of"),
    "weights gone": (lambda folder: (folder / WEIGHTS).unlink(), "missing"),
    "config gone": (lambda folder: (folder / CONFIG).unlink(), "missing"),
    "no json": (_file(CONFIG, b"{"), "not JSON"),
    "large config": (_file(CONFIG, b" " * (1 << 17)), "bytes"),
    "other kind": (_config(peft_type="PROMPT_TUNING"), "only a LORA"),
    "dora": (_config(use_dora=True), "use_dora"),
    "ranks": (_config(rank_pattern={"q_proj": 8}), "rank_pattern"),
    "saved modules": (_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "bias": (_config(bias="all"), "bias"),
    "unknown": (_config(turbo=1), "turbo"),
    "rank": (_config(r=RANK + 1), f"rank {RANK + 1}"),
    "no rank": (_config(r="4"), "rank r is 4"),
    "alpha": (_config(lora_alpha=-1), "lora_alpha"),
    "strange tensor": (_weights(**{"lm_head.weight": torch.zeros(2, 2)}), "lm_head.weight"),
    "integers": (_weights(**{FIRST: torch.zeros(RANK, HIDDEN, dtype=torch.int32)}), "I32"),
    "half": (_weights(**{FIRST.replace("q_proj", "k_proj"): torch.zeros(RANK, HIDDEN)}), "A or B alone"),
    "empty": (lambda folder: save_file({}, folder / WEIGHTS), "holds no weights"),
    "link": (lambda folder: (folder / "notes").symlink_to("/etc/hostname"), "link"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_or_hostile_adapter_is_refused(adapter: Path, fault: str) -> None:
    open_adapter(adapter)
    breaks, told = BROKEN[fault]
    breaks(adapter)
    with pytest.raises(QwenOnnxError, match=told):
        open_adapter(adapter)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"verdict": Verdict.FAIL}, "training ended with FAIL"),
        ({"files": {CONFIG: "0" * 64, WEIGHTS: "0" * 64}}, "altered since"),
        ({"training": load_training(REPOSITORY)}, "manifest says rank 16"),
    ],
)
def test_a_manifest_that_speaks_against_its_adapter_is_believed(
    adapter: Path, changes: dict[str, Any], told: str
) -> None:
    sign_adapter(adapter, "0" * 64)
    assert open_adapter(adapter).name == "faq"
    sign_adapter(adapter, "0" * 64, **changes)
    with pytest.raises(QwenOnnxError, match=told):
        open_adapter(adapter)


def test_an_adapter_without_a_manifest_is_called_by_its_folder(adapter: Path) -> None:
    found = open_adapter(adapter)
    assert (found.name, found.manifest, found.scale) == ("faq-1", None, 2.0)
    with pytest.raises(SourceError, match="not a name"):
        adapter_name("…")


def test_rank_stabilised_lora_has_its_own_scale(adapter: Path) -> None:
    rewrite_json(adapter / CONFIG, use_rslora=True)
    assert open_adapter(adapter).scale == 4.0
