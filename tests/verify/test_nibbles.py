"""Products with codes of 8 bits in two of 4 bits: the same numbers, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qwen_onnx.verify import nibbles
from qwen_onnx.verify.graph import Graph, attributes
from qwen_onnx.verify.nibbles import in_nibbles

ROWS, SIZE = 24, 16
Array = np.ndarray[Any, Any]


def product(folder: Path, inputs: int = 64, *, bits: int = 8, zeros: Any = np.uint8, bias: bool = False) -> Path:
    """A graph of one product whose logits are [tokens, ROWS]; ``zeros`` is their type, None for none."""
    random, blocks = np.random.default_rng(0), -(-inputs // SIZE)
    given = {
        "codes": random.integers(0, 256, (ROWS, blocks, SIZE * bits // 8), np.uint8),
        "scales": random.random((ROWS, blocks), np.float32),
        "zeros": random.integers(0, 256, (ROWS, -(-blocks * bits // 8))).astype(zeros or np.uint8),
        "bias": random.random(ROWS, np.float32),
    }
    named = ["codes", "scales", "zeros" if zeros else "", "", "bias" if bias else ""]
    told = {"N": ROWS, "K": inputs, "bits": bits, "block_size": SIZE, "accuracy_level": 1}
    node = helper.make_node("MatMulNBits", ["hidden", *named], ["logits"], "head", domain="com.microsoft", **told)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["tokens", inputs])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["tokens", ROWS])],
        [numpy_helper.from_array(given[name], name) for name in named if name],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(folder / "model.onnx"))
    return folder / "model.onnx"


def logits(graph: Graph, tokens: int) -> Array:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(graph.serialized(), options, providers=["CPUExecutionProvider"])
    width = session.get_inputs()[0].shape[1]
    hidden = np.random.default_rng(1).standard_normal((tokens, width)).astype(np.float32)
    found: Array = session.run(["logits"], {"hidden": hidden})[0]
    return found


def bits_of(graph: Graph) -> list[int]:
    return [attributes(node)["bits"] for node in graph.nodes if node.op_type == "MatMulNBits"]


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("zeros", [np.uint8, None])
@pytest.mark.parametrize("inputs", [64, 80, 72], ids=["even blocks", "odd blocks", "a block in part"])
def test_the_numbers_stay(tmp_path: Path, inputs: int, zeros: Any, bias: bool, tokens: int) -> None:
    plain, split = (Graph(product(tmp_path, inputs, zeros=zeros, bias=bias)) for _ in range(2))
    in_nibbles(split)
    assert (bits_of(plain), bits_of(split)) == ([8], [4, 4])
    wanted = logits(plain, tokens)
    assert wanted.std() > 100
    assert np.allclose(logits(split, tokens), wanted, rtol=1e-5, atol=1e-5 * wanted.std())


def older(graph: Graph) -> None:
    graph.model.opset_import[0].version = 17


@pytest.mark.parametrize(
    ("told", "change"),
    [({"bits": 4}, None), ({"zeros": np.float32}, None), ({}, older)],
    ids=["4 bits", "floats", "old"],
)
def test_the_rest_stays_as_it_is(tmp_path: Path, told: dict[str, Any], change: Callable[[Graph], None] | None) -> None:
    graph = Graph(product(tmp_path, **told))
    if change:
        change(graph)
    before = graph.serialized()
    in_nibbles(graph)
    assert graph.serialized() == before


def test_a_matrix_that_would_take_too_much_memory_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two fits, both do not."""
    graph = Graph(product(tmp_path))
    told = attributes(graph.nodes[0])
    monkeypatch.setattr(nibbles, "MOST_FOLDED", 1.5 * told["N"] * told["K"] * nibbles.FOLDING)
    second = onnx.NodeProto()
    second.CopyFrom(graph.model.graph.node[0])
    second.name, second.output[0] = "second", "more"
    graph.model.graph.node.extend([second])
    in_nibbles(graph)
    assert bits_of(graph) == [4, 4, 8]


def test_two_products_with_the_same_codes(tmp_path: Path) -> None:
    """As the head and the table share them: names of what is made are never the same."""
    graphs = [Graph(product(tmp_path)) for _ in range(2)]
    for graph in graphs:
        second = onnx.NodeProto()
        second.CopyFrom(graph.model.graph.node[0])
        second.name, second.output[0] = "second", "more"
        graph.model.graph.node[0].output[0] = "some"
        graph.model.graph.node.extend([second, helper.make_node("Add", ["some", "more"], ["logits"], "sum")])
    in_nibbles(graphs[1])
    assert bits_of(graphs[1]) == [4] * 4
    wanted, found = (logits(graph, 3) for graph in graphs)
    assert np.allclose(found, wanted, rtol=1e-5, atol=1e-5 * wanted.std())
