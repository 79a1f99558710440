"""A graph whose weights are stored in planes is proven as any other: parity, slices, bytes per token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from string import ascii_letters, digits

import numpy as np
import onnx
import pytest

from qwen_onnx.catalog.schema import Limits, Verification
from qwen_onnx.verify import VerifyOptions, corpus, verify_artifact
from qwen_onnx.verify.graph import KEPT, Graph
from qwen_onnx.verify.records import CheckResult, Verdict
from qwen_onnx.verify.roofline import bytes_per_token
from qwen_onnx.verify.scoring import OnnxScorer
from qwen_onnx.verify.slices import Cut, SlicedScorer
from tests.fixtures.faults import with_constants
from tests.fixtures.packed import GRAPH, small_and_packed

LIMITS = Limits(kld_mean=0.18, kld_p99=1.5, top1=0.01, ppl_ratio=1.2)
HEAD = r"lm_head\..*qweight\.plane4$"
TEXTS = [np.random.default_rng(seed).integers(2, 250, length).tolist() for seed, length in enumerate((40, 7))]


@pytest.fixture(scope="module")
def folders(tiny_unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same weights, as 8-bit codes and packed."""
    return small_and_packed(tiny_unpacked, tmp_path_factory.mktemp("packed"))


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> Callable[[Path], CheckResult]:
    """The check of a folder, on two short texts."""
    texts = {name: [corpus.Document(name, text)] for name, text in (("one", ascii_letters * 4), ("two", digits * 9))}
    monkeypatch.setattr(corpus, "domains", lambda render_chat: texts)

    def judged(folder: Path) -> CheckResult:
        options = VerifyOptions(checks=("graph_parity",), window=64, threads=1)
        report = verify_artifact(
            folder, tiny_checkpoint, None, LIMITS, level=Verification.NUMERICS_ON_CPU, options=options
        )
        return next(item for item in report.checks if item.name == "graph_parity")

    return judged


@pytest.mark.slow
def test_parity_sees_the_codes_and_not_the_planes(
    folders: tuple[Path, Path], parity: Callable[[Path], CheckResult]
) -> None:
    plain, packed = map(parity, folders)
    assert packed.verdict is Verdict.PASS, packed
    assert packed.measured == plain.measured


@pytest.mark.slow
def test_rows_of_a_plane_that_changed_places_are_found(
    folders: tuple[Path, Path], parity: Callable[[Path], CheckResult], tmp_path: Path
) -> None:
    """Of the plane with the high bits: two low bits of six are smaller than the rounding of a 4-bit matrix."""

    def swapped(values: np.ndarray) -> np.ndarray:
        return values[::-1]

    found = parity(with_constants(folders[1], tmp_path / "faulty", {HEAD: swapped}))
    assert found.verdict is Verdict.FAIL
    assert found.measured["row_error"] > 1


@pytest.mark.slow
def test_a_flipped_bit_of_every_code_of_a_row_is_found(
    folders: tuple[Path, Path], parity: Callable[[Path], CheckResult], tmp_path: Path
) -> None:
    def flipped(values: np.ndarray) -> np.ndarray:
        values[5] ^= 0x88
        return values

    faulty = with_constants(folders[1], tmp_path / "faulty", {HEAD: flipped})
    found = parity(faulty)
    assert found.verdict is Verdict.FAIL
    assert found.measured["row_error"] > 1


@pytest.mark.slow
def test_a_plane_that_lacks_a_row_is_told(
    folders: tuple[Path, Path], parity: Callable[[Path], CheckResult], tmp_path: Path
) -> None:
    copy = with_constants(folders[1], tmp_path / "faulty", {})
    model = onnx.load(str(copy / GRAPH), load_external_data=False)
    plane = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("qweight.plane4"))
    plane.dims[0] -= 1
    onnx.save(model, str(copy / GRAPH))
    found = parity(copy)
    assert found.verdict is Verdict.FAIL
    assert "does not fit into" in found.detail


@pytest.mark.slow
@pytest.mark.parametrize("in_float32", [False, True])
def test_slices_equal_the_whole_and_the_unpacked(folders: tuple[Path, Path], tmp_path: Path, in_float32: bool) -> None:
    plain, packed = folders
    sliced = SlicedScorer(Graph(packed / GRAPH), 1, tmp_path, 1, in_float32=in_float32)
    assert len(sliced.slices) == 3
    sliced.prepare(TEXTS)
    scorers = [OnnxScorer(folder, 1, in_float32=in_float32) for folder in (plain, packed)]
    for ids in TEXTS:
        wanted = scorers[0].logits(ids)
        assert np.array_equal(scorers[1].logits(ids), wanted)
        assert np.array_equal(sliced.logits(ids), wanted)


@pytest.mark.slow
def test_no_slice_holds_the_planes_of_another(folders: tuple[Path, Path]) -> None:
    for place, part in enumerate(Cut(Graph(folders[1] / GRAPH), 1)):
        graph = onnx.load_from_string(part.graph).graph
        names = [tensor.name for tensor in graph.initializer] + [name for node in graph.node for name in node.output]
        others = [name for name in names if "model.layers." in name and f"model.layers.{place}." not in name]
        assert not any("qweight" in name or "scales" in name for name in others), others
        read = {name for node in graph.node for name in node.input}
        made = [name for node in graph.node for name in node.output if "MatMulNBits" in name and "qweight" in name]
        assert made or place == 1
        assert set(made) <= read


@pytest.mark.slow
def test_a_token_reads_what_the_kernels_read(folders: tuple[Path, Path]) -> None:
    plain, packed = folders
    assert bytes_per_token(packed) == bytes_per_token(plain)
    sizes = [(folder / f"{GRAPH}.data").stat().st_size for folder in folders]
    assert sizes[1] < sizes[0]


@pytest.mark.slow
def test_few_folded_values_stay_in_memory(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_onnx.verify.graph.KEPT_BYTES", 1)
    graph = Graph(folders[1] / GRAPH)
    names = [name for node in graph.nodes if node.op_type == "MatMulNBits" for name in node.input[1:4]]
    values = {name: graph.tensor(name).copy() for name in names if name in graph.folded}
    assert len(values) > KEPT
    assert len(graph._made) == KEPT
    for name, value in values.items():
        assert np.array_equal(graph.tensor(name), value)
