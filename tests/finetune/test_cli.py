"""The commands as users type them: what they refuse, and what they leave in place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper
from safetensors.torch import load_file

from benchmarks.faq import lines
from qwen_onnx.catalog.training import Training
from qwen_onnx.cli.finetune import KEYS
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
    turned = json.dumps({"messages": [{"role": role, "content": "x"} for role in ("assistant", "user")]})
    data.write_text(f'{{"instruction": "a", "output": "b"}}\n{{\n{turned}\n[]\n')
    broken = run_cli("finetune", "starter", "--data", data)
    assert broken.returncode == 13
    assert "3 lines cannot be learnt from" in broken.stderr
    for line in (
        "line 2: it is not JSON",
        "line 3: roles out of order: assistant, user",
        "line 4: it is not an object",
    ):
        assert line in broken.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    occupied = run_cli("finetune", "starter", "--data", data, "--output", tmp_path / "mine")
    assert occupied.returncode == 13
    assert "something else" in occupied.stderr
    assert (tmp_path / "mine/notes.txt").exists()


@pytest.mark.release
def test_an_example_beyond_the_window_is_refused_cut_or_left_out_as_asked(
    data: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with data.open("a") as file:
        file.write(json.dumps({"instruction": "Go on.", "output": "word " * 900}) + "\n")
    asked = ("finetune", "starter", "--source", tiny_checkpoint, "--data", data, "--dry-run")
    refused = run_cli(*asked)
    assert refused.returncode == 13
    assert re.search(r"line 13: \d,\d+ tokens, a window holds 512", refused.stderr)
    assert "--set longer=truncate or --set longer=skip" in refused.stderr
    for option, done, rows in (("truncate", "cut", 13), ("skip", "left out", 12)):
        told = run_cli(*asked, "--set", f"longer={option}", "--json")
        assert told.returncode == 0, told.stderr
        assert f"{done}: line 13" in told.stderr
        cost = json.loads(told.stdout)
        assert cost["examples"] + cost["held_out"] == rows


@pytest.mark.slow
def test_nothing_is_left_to_learn_from_where_one_example_is_held_out(tiny_checkpoint: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text('{"instruction": "a", "output": "b"}\n')
    done = run_cli("finetune", "starter", "--source", tiny_checkpoint, "--data", one, "--output", tmp_path / "faq")
    assert done.returncode == 13
    assert "1 held out, none left to learn from" in done.stderr
    assert not (tmp_path / "faq").exists()


def test_the_help_names_every_option_and_so_does_a_wrong_one(data: Path) -> None:
    assert sorted(["name", *KEYS.split(", ")]) == sorted(Training.model_fields)
    wrong = run_cli("finetune", "starter", "--data", data, "--set", "epoch=3")
    assert wrong.returncode == 2
    assert "gradient_checkpointing" in wrong.stderr


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
