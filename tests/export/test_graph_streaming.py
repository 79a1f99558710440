"""genai's builder with its weights in files gives the graph and the bytes that it gives in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx.external_data_helper import load_external_data_for_model

# a process of its own for each, as the builder leaves global state behind
STOCK = """
import contextlib, sys
from pathlib import Path
from qwen_onnx.export import builder, streaming
from qwen_onnx.passes import GenAIModelBuilderConfig as Config
streaming.SMALLEST = 64
if sys.argv[4] == "stock":
    builder.weights_in_files = lambda folder: contextlib.nullcontext()
builder.build(Path(sys.argv[1]), Path(sys.argv[2]), Config.model_validate_json(sys.argv[3]))
"""
OPTIONS = {
    "default": '{"precision": "int4", "block_size": 32, "algo_config": "default", "is_symmetric": true}',
    "rtn_last": '{"precision": "int4", "block_size": 32, "algo_config": "rtn_last", "is_symmetric": false}',
    "k_quant_mixed": '{"precision": "int4", "block_size": 32, "algo_config": "k_quant_mixed", "is_symmetric": false}',
    "fp32": '{"precision": "fp32"}',
}


def built(checkpoint: Path, folder: Path, options: str, way: str) -> onnx.GraphProto:
    command = [sys.executable, "-c", STOCK, str(checkpoint), str(folder), options, way]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(folder.glob(".weights-*"))
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    load_external_data_for_model(model, str(folder))
    return model.graph


@pytest.mark.parametrize("algorithm", ["k_quant_mixed", *(pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS)])
def test_weights_in_files_change_nothing(algorithm: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    one = built(tiny_checkpoint, tmp_path / "stock", OPTIONS[algorithm], "stock")
    other = built(tiny_checkpoint, tmp_path / "files", OPTIONS[algorithm], "files")
    weights = [{t.name: (t.data_type, list(t.dims), t.raw_data) for t in graph.initializer} for graph in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert weights[0] == weights[1]
    nodes = [{node.name: node.SerializeToString() for node in graph.node} for graph in (one, other)]
    assert nodes[0] == nodes[1]
    assert [value.name for value in one.output] == [value.name for value in other.output]
    assert any(node.op_type == "MatMulNBits" for node in other.node) == (algorithm != "fp32")
