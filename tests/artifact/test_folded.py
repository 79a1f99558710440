"""What a graph makes of its constants alone: known by type and shape, computed one at a time, bounded."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qwen_onnx.artifact.folded import MOST_NODES, Folded, Kind
from qwen_onnx.artifact.stored import FLOAT, FLOAT16, UINT8, stored_array
from qwen_onnx.errors import ArtifactError


def folded(nodes: list[onnx.NodeProto], **constants: np.ndarray) -> Folded:
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [], [], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)])
    return Folded(model, Path("model.onnx"), ArtifactError)


def never(name: str) -> Any:
    raise AssertionError(f"{name} was read")


CODES = np.arange(24, dtype=np.uint8).reshape(2, 1, 12)
TWO_PLANES = [
    helper.make_node("BitShift", ["high", "shifts"], ["a"], direction="RIGHT"),
    helper.make_node("BitwiseAnd", ["a", "mask"], ["b"]),
    helper.make_node("Reshape", ["b", "shape"], ["c"]),
    helper.make_node("BitwiseOr", ["c", "c"], ["codes"]),
    helper.make_node("MatMul", ["x", "codes"], ["y"]),
]
PARTS: dict[str, np.ndarray] = {
    "high": CODES,
    "shifts": np.array([0, 4], np.uint8).reshape(1, 2, 1),
    "mask": np.array(15, np.uint8),
    "shape": np.array([2, 3, 8]),
}


def test_values_of_constants_alone_are_known_before_anything_is_read() -> None:
    found = folded(TWO_PLANES, **PARTS)
    assert {name for name in "abcxy" if name in found} == set("abc")
    assert "codes" in found
    assert "high" not in found
    assert found.kind("codes") == Kind(UINT8, (2, 3, 8))
    assert found.kind("codes").bytes == found.kind("codes").count == 48
    assert found.kind("high") == Kind(UINT8, (2, 1, 12))
    assert [tensor.name for tensor in found.sources("codes")] == list(PARTS)
    assert [tensor.name for tensor in found.sources("high")] == ["high"]


def test_a_value_is_computed_by_the_operators_definitions() -> None:
    wanted = np.concatenate([CODES & 15, CODES >> 4], axis=1).reshape(2, 3, 8)
    found = folded(TWO_PLANES, **PARTS).value("codes", never)
    assert found.dtype == np.uint8
    assert np.array_equal(found, wanted)


def test_scales_in_half_precision() -> None:
    cast = helper.make_node("Cast", ["half"], ["scales"], to=TensorProto.FLOAT)
    found = folded([cast], half=np.array([0.5, 3], np.float16))
    assert found.kind("scales") == Kind(FLOAT, (2,))
    assert found.kind("half") == Kind(FLOAT16, (2,))
    assert found.value("scales", never).dtype == np.float32


def test_scales_that_blocks_share() -> None:
    nodes = [
        helper.make_node("Cast", ["half"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Expand", ["a", "times"], ["b"]),
        helper.make_node("Reshape", ["b", "shape"], ["scales"]),
    ]
    constants = {"half": np.array([[0.5], [3]], np.float16), "times": np.array([1, 4]), "shape": np.array([8])}
    found = folded(nodes, **constants)
    assert found.kind("scales") == Kind(FLOAT, (8,))
    assert found.value("scales", never).tolist() == [0.5] * 4 + [3] * 4
    # how often is not known without reading
    assert "b" not in folded(nodes[:2], half=constants["half"], other=constants["times"])


def test_what_is_not_made_of_constants_is_no_constant() -> None:
    found = folded(TWO_PLANES, **PARTS)
    with pytest.raises(ArtifactError, match="y cannot be read: it is not a constant"):
        found.kind("y")
    # a target that is computed, or that is not in the graph file, is not known without reading
    reshaped = helper.make_node("Reshape", ["high", "other"], ["z"])
    assert "z" not in folded([reshaped], high=CODES, shape=PARTS["shape"])
    assert "z" not in folded([reshaped], high=CODES, other=np.ones(9, np.int64))


REFUSED = {
    "fit into": (helper.make_node("Reshape", ["high", "shape"], ["z"]), {"shape": np.array([5, 5])}),
    "does not fit": (helper.make_node("Reshape", ["high", "shape"], ["z"]), {"shape": np.array([-1, -24])}),
    "two inputs of uint8": (helper.make_node("BitwiseAnd", ["high", "wide"], ["z"]), {"wide": np.ones(12, np.uint32)}),
    "cannot be broadcast": (helper.make_node("BitwiseAnd", ["high", "mask"], ["z"]), {"mask": np.ones(5, np.uint8)}),
    "8 times as large": (
        helper.make_node("BitwiseAnd", ["high", "mask"], ["z"]),
        {"mask": np.ones((20, 1), np.uint8)},
    ),
    "more than 8 times": (helper.make_node("Expand", ["high", "many"], ["z"]), {"many": np.array([2, 9, 12])}),
    "broadcast": (helper.make_node("Expand", ["high", "many"], ["z"]), {"many": np.array([2, 1, 5])}),
    "casts something else": (helper.make_node("Cast", ["high"], ["z"], to=TensorProto.STRING), {}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_strangers_expression_is_refused_before_it_is_computed(what: str) -> None:
    node, constants = REFUSED[what]
    found = folded([node], high=CODES, **constants)
    with pytest.raises(ArtifactError, match=rf"z cannot be read: .*{what}"):
        found.value("z", never)


def test_damaged_constants_are_named() -> None:
    """Their bytes are not as many as their shape says, or an operator lacks what it needs."""
    shape = TensorProto(name="shape", data_type=TensorProto.INT64, dims=[2], raw_data=b"short")
    mask = TensorProto(name="mask", data_type=TensorProto.UINT8, dims=[12], raw_data=b"short")
    nodes = [
        helper.make_node("Reshape", ["high", "shape"], ["a"]),
        helper.make_node("BitwiseAnd", ["high", "mask"], ["b"]),
        helper.make_node("BitShift", ["high", "high"], ["c"]),
    ]
    weights = [numpy_helper.from_array(CODES, "high"), shape, mask]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], weights))
    found = Folded(model, Path("model.onnx"), ArtifactError)
    for name in "abc":
        with pytest.raises(ArtifactError, match=f"{name} cannot be read"):
            found.value(name, never)


def test_a_long_chain_is_refused() -> None:
    names = ["high", *(f"v{place}" for place in range(MOST_NODES + 1))]
    nodes = [helper.make_node("BitwiseOr", [a, a], [b]) for a, b in pairwise(names)]
    found = folded(nodes, high=CODES)
    assert np.array_equal(found.value(names[-2], never), CODES)
    with pytest.raises(ArtifactError, match="more than 16 operators"):
        found.value(names[-1], never)


def external(**entries: object) -> TensorProto:
    tensor = TensorProto(name="w", data_type=UINT8, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def test_a_stored_constant_is_mapped_and_nothing_else_is(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"abcdef")
    file = tmp_path / "model.onnx"
    found = stored_array(external(location="data", offset=2, length=4), file, ArtifactError)
    assert found.tobytes() == b"cdef"
    found[:] = 0
    assert (tmp_path / "data").read_bytes() == b"abcdef"
    for entries in (
        {"location": "data", "offset": 3},
        {"location": "data", "offset": -1},
        {"location": f"../{tmp_path.name}/data"},
        {"location": "data", "offset": "two"},
        {"location": "other"},
        {},
    ):
        with pytest.raises(ArtifactError, match="w is not in"):
            stored_array(external(**entries), file, ArtifactError)
    with pytest.raises(ArtifactError, match="w is not a constant that can be read"):
        stored_array(numpy_helper.from_array(np.array([1.0]), "w"), file, ArtifactError)
