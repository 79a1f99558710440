"""genai's builder with its weights in files gives the graph and the bytes that it gives in memory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from onnx.external_data_helper import load_external_data_for_model
from transformers import AutoModelForCausalLM

from qwen_onnx.errors import ExportError
from qwen_onnx.export.passes.genai_builder.build import build
from qwen_onnx.export.passes.genai_builder.options import GenAIModelBuilderOptions as Config
from tests.conftest import rewrite_json
from tests.fixtures.architectures import make_checkpoint

# a process of its own for each, as the builder leaves global state behind; "stock" is genai's builder as it comes
STOCK = """
import contextlib, sys
from pathlib import Path
from qwen_onnx.export.passes.genai_builder import build as builder, graph_steps, streaming
from qwen_onnx.export.passes.genai_builder.options import GenAIModelBuilderOptions as Config
streaming.SMALLEST, graph_steps.MATRIX_PIECE = 64, 64 * 50
if sys.argv[4] == "stock":
    builder.weights_in_files = lambda *_: contextlib.nullcontext()
kept = Path(sys.argv[5]) if len(sys.argv) > 5 else None
builder.build(Path(sys.argv[1]), Path(sys.argv[2]), Config.model_validate_json(sys.argv[3]), kept)
"""
OPTIONS = {
    "default": '{"precision": "int4", "block_size": 32, "algo_config": "default", "is_symmetric": true}',
    "rtn_last": '{"precision": "int4", "block_size": 32, "algo_config": "rtn_last", "is_symmetric": false}',
    "k_quant_mixed": '{"precision": "int4", "block_size": 32, "algo_config": "k_quant_mixed", "is_symmetric": false}',
    "k_quant_last": '{"precision": "int4", "block_size": 32, "algo_config": "k_quant_last", "is_symmetric": false}',
    "fp32": '{"precision": "fp32"}',
}


EXPERTS = ', "qmoe_block_size": 32, "accuracy_level": 4}'


def built(checkpoint: Path, folder: Path, options: str, way: str) -> onnx.GraphProto:
    command = [sys.executable, "-c", STOCK, str(checkpoint), str(folder), options, way]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(folder.glob(".weights-*"))
    return graph_of(folder)


def graph_of(folder: Path) -> onnx.GraphProto:
    """The graph with all weights read."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    load_external_data_for_model(model, str(folder))
    return model.graph


def assert_same(one: onnx.GraphProto, other: onnx.GraphProto) -> None:
    weights = [{t.name: (t.data_type, list(t.dims), t.raw_data) for t in graph.initializer} for graph in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert weights[0] == weights[1]
    nodes = [{node.name: node.SerializeToString() for node in graph.node} for graph in (one, other)]
    assert nodes[0] == nodes[1]
    assert [value.name for value in one.output] == [value.name for value in other.output]


@pytest.mark.release
@pytest.mark.parametrize("algorithm", OPTIONS)
def test_weights_in_files_change_nothing(algorithm: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    one = built(tiny_checkpoint, tmp_path / "stock", OPTIONS[algorithm], "stock")
    other = built(tiny_checkpoint, tmp_path / "files", OPTIONS[algorithm], "files")
    assert_same(one, other)
    assert any(node.op_type == "MatMulNBits" for node in other.node) == (algorithm != "fp32")


def make_sharded(architecture: str, folder: Path) -> Path:
    """A tiny mixture of experts in bfloat16 shards."""
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(architecture, folder), dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


@pytest.mark.release
@pytest.mark.parametrize(
    ("architecture", "algorithm"),
    [
        ("Qwen3MoeForCausalLM", "k_quant_last"),
        ("Qwen2MoeForCausalLM", "default"),
        ("Qwen2MoeForCausalLM", "fp32"),
        ("Qwen3NextForCausalLM", "k_quant_last"),
    ],
)
def test_experts_one_by_one_are_those_that_transformers_stacks(
    architecture: str, algorithm: str, tmp_path: Path
) -> None:
    checkpoint = make_sharded(architecture, tmp_path / "checkpoint")
    options = OPTIONS[algorithm].replace("}", EXPERTS)
    other = built(checkpoint, tmp_path / "files", options, "files")
    assert_same(built(checkpoint, tmp_path / "stock", options, "stock"), other)
    operator = "MoE" if algorithm == "fp32" else "QMoE"
    assert sum(node.op_type == operator for node in other.node) > 1


@pytest.mark.slow
def test_experts_that_the_checkpoint_stacks_are_the_same(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("Qwen3_5MoeForConditionalGeneration", tmp_path / "checkpoint")
    options = OPTIONS["k_quant_last"].replace("}", EXPERTS)
    one, other = (built(checkpoint, tmp_path / way, options, way) for way in ("stock", "files"))
    assert_same(one, other)


def test_a_missing_or_misshapen_weight_is_named(tmp_path: Path) -> None:
    checkpoint = make_sharded("Qwen3MoeForCausalLM", tmp_path / "checkpoint")
    index = checkpoint / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    for name in ("model.layers.1.mlp.experts.5.up_proj.weight", "model.layers.1.self_attn.q_norm.weight"):
        kept = {other: file for other, file in whole["weight_map"].items() if other != name}
        index.write_text(json.dumps(whole | {"weight_map": kept}))
        with pytest.raises(ExportError, match="lacks a weight") as caught:
            build(checkpoint, tmp_path / "out", Config(precision="fp32"))
        assert name in str(caught.value.where)
    index.write_text(json.dumps(whole))
    rewrite_json(checkpoint / "config.json", hidden_size=32)
    with pytest.raises(ExportError, match=r"embed_tokens.weight is \[288, 64\], its architecture has \[288, 32\]"):
        build(checkpoint, tmp_path / "out", Config(precision="fp32"))


def started(checkpoint: Path, folder: Path, options: str, kept: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", STOCK, str(checkpoint), str(folder), options, "files", str(kept)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.release
@pytest.mark.parametrize(
    ("line", "again"),
    [
        ("packed the experts of layer 1 of 2", ["packed the experts of layer 1 of"]),
        (
            "quantised the matrices of part 1 of 3",
            ["packed the experts of layer", "quantised the matrices of part 1 of"],
        ),
    ],
)
def test_a_killed_build_goes_on_behind_its_finished_layers(line: str, again: list[str], tmp_path: Path) -> None:
    checkpoint = make_sharded("Qwen2MoeForCausalLM", tmp_path / "checkpoint")
    options, kept = OPTIONS["k_quant_last"].replace("}", EXPERTS), tmp_path / "kept"
    child = started(checkpoint, tmp_path / "killed", options, kept)
    for text in child.stdout or ():
        if line in text:
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed/model.onnx").exists()
    finished = {path.stat().st_ino for path in kept.glob("*-*.json")}
    assert finished
    resumed = started(checkpoint, tmp_path / "resumed", options, kept)
    said = resumed.communicate()[0]
    assert resumed.returncode == 0
    assert all(begin not in said for begin in again)
    assert "quantised the matrices of part 3 of 3" in said
    assert finished <= {path.stat().st_ino for path in kept.glob("*-*.json")}
    assert_same(built(checkpoint, tmp_path / "whole", options, "files"), graph_of(tmp_path / "resumed"))
