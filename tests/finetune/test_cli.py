"""The commands as users type them: what they refuse, and what they leave in place."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper
from safetensors.torch import load_file

from benchmarks.faq import lines
from qwen_onnx.sources.fetch import cache_root
from tests.conftest import REPOSITORY, run_cli


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "faq.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines().splitlines()[:12]))
    return path


@pytest.mark.slow
def test_faults_of_options_and_of_data_are_told(data: Path, tmp_path: Path) -> None:
    wrong = run_cli("finetune", "starter", "--data", data, "--set", "rank=0", "--set", "epoch=3")
    assert wrong.returncode == 2
    assert "--set rank:" in wrong.stderr
    assert "--set epoch: unknown key" in wrong.stderr
    against = run_cli("finetune", "starter", "--data", data, "--against", tmp_path / "none")
    assert against.returncode == 6
    assert "there is no artifact" in against.stderr
    data.write_text('{"instruction": "a", "output": "b"}\n{\n[]\n')
    broken = run_cli("finetune", "starter", "--data", data)
    assert broken.returncode == 13
    assert "2 lines cannot be learnt from" in broken.stderr
    assert "line 2" in broken.stderr
    assert "line 3" in broken.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    occupied = run_cli("finetune", "starter", "--data", data, "--output", tmp_path / "mine")
    assert occupied.returncode == 13
    assert "something else" in occupied.stderr
    assert (tmp_path / "mine/notes.txt").exists()


def test_an_adapter_that_is_none_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    done = run_cli("optimize", "starter", "--adapter", tmp_path / "none", "--output", tmp_path / "artifact")
    assert done.returncode == 4
    assert "there is no adapter" in done.stderr
    assert not (tmp_path / "artifact").exists()


@pytest.mark.slow
def test_from_examples_to_an_artifact_of_the_merged_model(data: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    adapter, artifact = tmp_path / "adapters/faq", tmp_path / "artifact"
    source = ("--source", tiny_checkpoint)
    dry = run_cli("finetune", "starter", *source, "--data", data, "--output", adapter, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert json.loads(dry.stdout.splitlines()[-1])["memory"] > 10**8
    assert not adapter.exists()
    gentle = ("--set", "learning_rate=1e-2", "--set", "epochs=4")
    done = run_cli("finetune", "starter", *source, "--data", data, "--output", adapter, *gentle, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "PASS"
    exact = ("--precision", "fp32", "--no-verify")
    built = run_cli("optimize", "starter", *source, "--adapter", adapter, "--output", artifact, *exact)
    assert built.returncode == 0, built.stderr
    plan = json.loads((artifact / "manifest.json").read_text())["plan"]
    assert plan["model"] == "checkpoint-faq"
    assert plan["adapter"]["name"] == "faq"
    assert plan["adapter"]["data"] == json.loads((adapter / "adapter.json").read_text())["data"]["sha256"]
    assert "not in the catalogue" in json.loads((artifact / "manifest.json").read_text())["claim"]
    plain = load_file(tiny_checkpoint / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    merged = {
        numpy_helper.to_array(tensor, str(artifact)).tobytes()
        for tensor in onnx.load(artifact / "model.onnx").graph.initializer
        if list(tensor.dims) == [64, 64]
    }
    assert plain.T.contiguous().numpy().tobytes() not in merged
    folders = (cache_root(REPOSITORY) / "checkpoints").glob("*/model.safetensors")
    newest = load_file(max(folders, key=lambda path: path.stat().st_mtime))
    assert newest["model.layers.0.self_attn.o_proj.weight"].T.contiguous().numpy().tobytes() in merged
    # the same again is found, whatever its place
    again = run_cli("optimize", "starter", *source, "--adapter", adapter, "--output", artifact, *exact)
    assert "already built" in again.stderr
    other = run_cli("optimize", "starter", *source, "--output", artifact, *exact)
    assert "already built" not in other.stderr
