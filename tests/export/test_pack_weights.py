"""``PackWeights``: smaller files, and not one bit of the logits is another."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qwen_onnx.catalog.costs import Stored
from qwen_onnx.catalog.registry import passes
from qwen_onnx.catalog.schema import Readback
from qwen_onnx.errors import ExportError
from qwen_onnx.export.passes.fisher_gptq.kernels import Kernel, plane_bytes
from qwen_onnx.export.passes.fisher_gptq.solver import Grid
from qwen_onnx.export.passes.pack_weights.pack import pack
from qwen_onnx.export.passes.pack_weights.planes import pack_plane
from qwen_onnx.export.readback.onnx import compare, read_graph
from qwen_onnx.verify.graph import Graph
from qwen_onnx.verify.scoring import OnnxScorer
from tests.conftest import edit_int4, run_cli
from tests.fixtures.packed import GRAPH, small_and_packed, with_small_codes

IDS = np.random.default_rng(0).integers(2, 250, 40).tolist()
ASKED = Readback(body_bits=4, head_bits=8, block_size=64, symmetric=False, accuracy_level=4)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 5, 6, 7])
def test_the_packed_graph_computes_the_same_to_the_bit(tiny_unpacked: Path, tmp_path: Path, bits: int) -> None:
    small, packed = small_and_packed(tiny_unpacked, tmp_path, bits)
    assert np.array_equal(OnnxScorer(small, 1).logits(IDS), OnnxScorer(packed, 1).logits(IDS))
    before, after = Graph(small / GRAPH), Graph(packed / GRAPH)
    for tensor in before.model.graph.initializer:
        if tensor.data_type != TensorProto.INT64:
            assert np.array_equal(before.tensor(tensor.name), after.tensor(tensor.name)), tensor.name
    facts = read_graph(packed / GRAPH)["nodes"].values()
    assert {node["stored_bits"] for node in facts if node["bits"] == 8} == {bits}
    assert {node["stored_bits"] for node in facts if node["bits"] == 4} == {4}
    assert {node["scale_bits"] for node in facts} == {16}
    assert (packed / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_planes_take_the_bits_that_they_promise(tiny_unpacked: Path, tmp_path: Path) -> None:
    small, packed = small_and_packed(tiny_unpacked, tmp_path)
    saved = 0
    graph = Graph(small / GRAPH)
    matrices = {node.input[1]: node for node in graph.nodes if node.op_type == "MatMulNBits"}
    for node in matrices.values():
        saved += graph.tensor(node.input[2]).nbytes // 2
        if any(item.name == "bits" and item.i == 8 for item in node.attribute):
            saved += sum(graph.tensor(name).nbytes // 4 for name in (node.input[1], node.input[3]))
    found = [(folder / f"{GRAPH}.data").stat().st_size for folder in (small, packed)]
    # what is before a tensor so that it begins at a multiple of 64
    assert abs(found[0] - found[1] - saved) < 64 * 6 * len(matrices) < saved


@pytest.mark.slow
def test_packing_twice_writes_the_same_bytes(tiny_unpacked: Path, tmp_path: Path) -> None:
    small, packed = small_and_packed(tiny_unpacked, tmp_path)
    pack(small / GRAPH, tmp_path / "again")
    for name in (GRAPH, f"{GRAPH}.data"):
        assert (tmp_path / "again" / name).read_bytes() == (packed / name).read_bytes()
    # what is packed has nothing left to pack
    pack(packed / GRAPH, tmp_path / "twice")
    assert (tmp_path / "twice" / f"{GRAPH}.data").read_bytes() == (packed / f"{GRAPH}.data").read_bytes()


@pytest.mark.slow
def test_what_does_not_fit_stays_as_it_is(tiny_unpacked: Path, tmp_path: Path) -> None:
    """Codes of 8 bits, and scales that half precision would round."""
    pack(with_small_codes(tiny_unpacked, tmp_path / "eight", 8) / GRAPH, tmp_path / "packed")
    assert {node["stored_bits"] for node in read_graph(tmp_path / "packed" / GRAPH)["nodes"].values()} == {4, 8}
    uneven = with_small_codes(tiny_unpacked, tmp_path / "uneven", 8, factor=1 + 2**-13)
    pack(uneven / GRAPH, tmp_path / "unrounded")
    before, after = (read_graph(folder / GRAPH)["nodes"] for folder in (uneven, tmp_path / "unrounded"))
    assert {node["scale_bits"] for node in after.values()} == {32}
    assert [node["stored_bits"] for node in after.values()] == [node["bits"] for node in before.values()]
    assert np.array_equal(OnnxScorer(uneven, 1).logits(IDS), OnnxScorer(tmp_path / "unrounded", 1).logits(IDS))


def test_a_plane_is_read_back_by_its_definition() -> None:
    codes = np.random.default_rng(1).integers(0, 64, (3, 16), dtype=np.uint8)
    for width, shift in ((4, 2), (2, 0), (1, 0)):
        found = pack_plane(codes, width, shift)
        assert found.shape == (3, 2 * width)
        columns = [found >> place & (2**width - 1) for place in range(0, 8, width)]
        assert np.array_equal(np.concatenate(columns, axis=1), codes >> shift & (2**width - 1))


NAME = "model.layers.99.attn.qkv_proj.MatMul.weight_Q8G16"


def one_matrix(path: Path, bits: int, run: int) -> dict[str, np.ndarray]:
    """Write a matrix [96, 128] of 8 bits in blocks of 16, ``run`` of which share a scale and a zero point."""
    random = np.random.default_rng(bits)
    shared = (96, 8 // run)
    scales = random.random(shared).astype(np.float16).astype(np.float32)
    weights = {
        NAME: random.integers(0, 2**bits, (96, 8, 16), dtype=np.uint8),
        f"{NAME}.scales": np.repeat(scales, run, 1).reshape(-1),
        f"{NAME}.zeros": np.repeat(random.integers(0, 2**bits, shared, dtype=np.uint8), run, 1).reshape(-1),
    }
    options = {"bits": 8, "K": 128, "N": 96, "block_size": 16, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", *weights], ["logits"], NAME, domain="com.microsoft", **options)
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, n]) for name, n in (("x", 128), ("logits", 96))
    ]
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", values[:1], values[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return weights


@pytest.mark.parametrize("run", [1, 2, 4])
@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_what_blocks_share_is_stored_once(tmp_path: Path, bits: int, run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    weights = one_matrix(tmp_path / GRAPH, bits, run)
    pack(tmp_path / GRAPH, tmp_path / "out")
    graph = Graph(tmp_path / "out" / GRAPH)
    assert all(np.array_equal(graph.tensor(name), value) for name, value in weights.items())
    x = np.random.default_rng(0).standard_normal((1, 128), np.float32)
    before, after = (
        onnxruntime.InferenceSession(str(folder / GRAPH)).run(None, {"x": x})[0]
        for folder in (tmp_path, tmp_path / "out")
    )
    assert np.array_equal(before, after)
    # codes, scales of two bytes and zero points, each tensor at a multiple of 64
    expected = (96 * 128 * bits + 96 * 8 // run * (16 + bits)) // 8
    data, nodes = (tmp_path / "out" / name for name in (f"{GRAPH}.data", GRAPH))
    assert 0 <= data.stat().st_size - expected < 64 * 7
    monkeypatch.setattr("qwen_onnx.export.readback.onnx.provider_of", lambda folder: "cpu")
    [facts] = read_graph(nodes)["nodes"].values()
    assert (facts["stored_bits"], facts["scale_bits"], facts["scale_block"]) == (bits, 16, 16 * run)


@pytest.mark.parametrize("bits", [4, 5, 6, 7])
def test_planes_add_no_more_to_the_graph_than_the_quantiser_counts(tmp_path: Path, bits: int) -> None:
    sizes = []
    for number in (bits, 8):
        folder = tmp_path / str(number)
        folder.mkdir()
        one_matrix(folder / GRAPH, number, 4)
        pack(folder / GRAPH, folder / "out")
        found = sum((folder / "out" / name).stat().st_size for name in (GRAPH, f"{GRAPH}.data"))
        sizes.append(found - (96 * 128 * number + 96 * 2 * (16 + number)) // 8)
    assert 500 < sizes[0] - sizes[1] <= plane_bytes(Grid(bits, 64), Kernel(8, 16))


def with_rows(path: Path, codes: np.ndarray, opset: int = 22) -> Path:
    """A graph of one matrix whose weights are in the file itself."""
    inputs = codes.shape[1] * codes.shape[2]
    weights = {"codes": codes, "scales": np.full(len(codes) * codes.shape[1], 0.5, np.float32)}
    node = helper.make_node(
        "MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", bits=8, K=inputs, N=len(codes)
    )
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph([node], "g", values[:1], values[1:], initializers)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), str(path))
    return path


@pytest.mark.parametrize(("inputs", "packed"), [(16, True), (12, False)])
def test_rows_that_do_not_divide_into_bytes_stay(tmp_path: Path, inputs: int, packed: bool) -> None:
    codes = np.arange(3 * inputs, dtype=np.uint8).reshape(3, 1, inputs)
    pack(with_rows(tmp_path / GRAPH, codes), tmp_path / "out")
    graph = Graph(tmp_path / "out" / GRAPH)
    assert ("codes" in graph.folded) == packed
    assert np.array_equal(graph.tensor("codes"), codes)
    assert np.array_equal(graph.tensor("scales"), np.full(3, 0.5, np.float32))


@pytest.mark.slow
def test_a_graph_that_cannot_be_packed_is_named(tiny_unpacked: Path, tmp_path: Path) -> None:
    old = with_rows(tmp_path / GRAPH, np.zeros((2, 1, 8), np.uint8), opset=17)
    with pytest.raises(ExportError, match="opset 17, bit planes need 18"):
        pack(old, tmp_path / "out")
    shutil.copytree(tiny_unpacked, tmp_path / "short")
    data = tmp_path / "short" / f"{GRAPH}.data"
    data.write_bytes(data.read_bytes()[:5000])
    with pytest.raises(ExportError, match=r"is not in model\.onnx\.data"):
        pack(tmp_path / "short" / GRAPH, tmp_path / "out")
    assert not (tmp_path / "out" / GRAPH).exists()
    nested = with_rows(tmp_path / GRAPH, np.zeros((2, 1, 8), np.uint8))
    model = onnx.load(str(nested))
    branch = helper.make_graph([], "branch", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["d"], name="fork", then_branch=branch, else_branch=branch))
    onnx.save(model, str(nested))
    with pytest.raises(ExportError, match="fork has a graph or weights of its own"):
        pack(nested, tmp_path / "out")


@pytest.mark.slow
def test_the_plan_says_what_must_be_stored(tiny_unpacked: Path, tmp_path: Path) -> None:
    small, packed = small_and_packed(tiny_unpacked, tmp_path)
    block = next(iter(read_graph(packed / GRAPH)["nodes"].values()))["block_size"]
    asked = ASKED.model_copy(update={"block_size": block})
    wanted = asked.model_copy(update={"stored_bits": (5, 6), "scale_bits": 16})
    matrices = compare(read_graph(packed / GRAPH), wanted)["matrices"]
    assert {(item["bits"], item["stored_bits"], item["scale_bits"]) for item in matrices} == {(4, 4, 16), (8, 6, 16)}
    for folder, other, told in (
        (packed, asked, r"codes are stored in 6 bits, asked \[8\]"),
        (packed, wanted.model_copy(update={"stored_bits": (5,)}), r"stored in 6 bits, asked \[5\]"),
        (packed, wanted.model_copy(update={"scale_block": 2 * block}), f"{block} weights share a stored scale, asked"),
        (packed, wanted.model_copy(update={"scale_bits": 32}), "scales are stored in 16 bits, asked 32"),
        (small, wanted, "scales are stored in 32 bits, asked 16"),
        (small, asked.model_copy(update={"stored_bits": (6, 8)}), r"no matrix is stored in planes, asked \[6, 8\]"),
        (packed, wanted.model_copy(update={"block_size": 2 * block}), f"block_size is {block}, asked {2 * block}"),
    ):
        with pytest.raises(ExportError, match=told):
            compare(read_graph(folder / GRAPH), other)
    compare(read_graph(packed / GRAPH), wanted.model_copy(update={"block_size": 128, "finer_blocks": (block, 16)}))


def test_only_matrices_have_planes() -> None:
    for change in ({"stored_bits": (6,)}, {"finer_blocks": (32,)}, {"scale_bits": 16}, {"scale_block": 64}):
        with pytest.raises(ValueError, match="has no meaning for float weights"):
            Readback.model_validate({"form": "float", "body_bits": 32, "head_bits": 32, **change})
    with pytest.raises(ValueError, match="stored_bits"):
        Readback.model_validate({**ASKED.model_dump(), "stored_bits": (3,)})


def test_planes_are_for_the_cpu_and_their_cost_is_a_bound() -> None:
    options = passes()["PackWeights"]()
    assert options.faults("CPUExecutionProvider") == []
    assert "for CPUExecutionProvider" in options.faults("CUDAExecutionProvider")[0]
    assert options.reference() is None
    assert options.written(None, Stored(1000, 50, 0, scales=100)).total == 850  # type: ignore[arg-type]


@pytest.mark.release
def test_the_pass_runs_behind_the_builder(tiny_checkpoint: Path, checkout: Path) -> None:
    """CalibratedGptq uses all 8 bits: nothing is stored in planes, and a plan that wants them is told."""

    def calibrated(build: dict) -> None:  # type: ignore[type-arg]
        build["steps"][0] = {"name": "quantize", "type": "CalibratedGptq", "config": {"group_size": 64}}
        build["larger"] = []
        build["readback"].update(stored_bits=[], scale_bits=None, finer_blocks=[])

    edit_int4(checkout / "pipelines/cpu.yaml", calibrated)
    command = ["optimize", "starter", "--source", tiny_checkpoint, "--no-verify", "--output"]
    done = run_cli(*command, checkout / "built", cwd=checkout)
    assert done.returncode == 0, done.stderr
    model = onnx.load(str(checkout / "built" / GRAPH), load_external_data=False)
    assert not any(node.op_type.startswith("Bit") for node in model.graph.node)
    assert "packing the weights of" in (checkout / "built/build.log").read_text()
    edit_int4(checkout / "pipelines/cpu.yaml", lambda build: build["readback"].update(stored_bits=[6, 8]))
    done = run_cli(*command, checkout / "other", cwd=checkout)
    assert done.returncode != 0
    assert "no matrix is stored in planes" in done.stderr
