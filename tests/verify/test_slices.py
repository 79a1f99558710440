"""A graph in slices computes what the whole graph computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qwen_onnx.catalog.schema import Limits, Verification
from qwen_onnx.errors import VerificationError
from qwen_onnx.export.passes.genai_builder.build import build
from qwen_onnx.export.passes.genai_builder.options import GenAIModelBuilderOptions
from qwen_onnx.verify import Verdict, VerifyOptions, context, verify_artifact
from qwen_onnx.verify.graph import Graph
from qwen_onnx.verify.scoring import OnnxScorer
from qwen_onnx.verify.slices import Cut, SlicedScorer
from tests.fixtures.architectures import make_checkpoint
from tests.fixtures.vision import stacked_artifact

__all__ = ["stacked_artifact"]

RANDOM = np.random.default_rng(0)
TEXTS = [RANDOM.integers(2, 256, length).tolist() for length in (40, 40, 7)]
LIMITS = Limits(kld_mean=0.18, kld_p99=1.5, top1=0.01, ppl_ratio=1.2)
INT4 = {"precision": "int4", "block_size": 32, "accuracy_level": 4, "algo_config": "rtn_last", "qmoe_block_size": 32}


def assert_equal(folder: Path, scratch: Path, layers: int, *, in_float32: bool) -> int:
    sliced = SlicedScorer(Graph(folder / "model.onnx"), 1, scratch, layers, in_float32=in_float32)
    sliced.prepare(TEXTS)
    whole = OnnxScorer(folder, 1, in_float32=in_float32)
    for ids in TEXTS:
        assert np.abs(sliced.logits(ids) - whole.logits(ids)).max() <= 1e-5
    return len(sliced.slices)


def test_slices_equal_the_whole(tiny_build: Path, tmp_path: Path) -> None:
    assert assert_equal(tiny_build, tmp_path, 1, in_float32=False) == 3
    assert assert_equal(tiny_build, tmp_path, 1, in_float32=True) == 3
    assert assert_equal(tiny_build, tmp_path / "all", 2, in_float32=False) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("Qwen3_5MoeForConditionalGeneration", INT4),
        ("Qwen3NextForCausalLM", INT4),
        ("Qwen3ForCausalLM", {"precision": "fp16", "execution_provider": "cuda", "fuse_qk_norm_gqa": False}),
    ],
)
def test_experts_linear_attention_and_fp16(architecture: str, options: dict[str, object], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(architecture, tmp_path / "checkpoint")
    build(checkpoint, tmp_path / "built", GenAIModelBuilderOptions.model_validate(options))
    for in_float32 in (False, True):
        assert assert_equal(tmp_path / "built", tmp_path / "scratch", 1, in_float32=in_float32) > 2


@pytest.mark.slow
def test_what_deepstack_adds_crosses_slices(stacked_artifact: Path, tmp_path: Path) -> None:
    for in_float32 in (False, True):
        assert assert_equal(stacked_artifact, tmp_path, 1, in_float32=in_float32) == 4


def test_no_slice_holds_the_weights_of_another(tiny_build: Path) -> None:
    graph = Graph(tiny_build / "model.onnx")
    for place, part in enumerate(Cut(graph, 1)):
        names = [tensor.name for tensor in onnx.load_from_string(part.graph).graph.initializer]
        others = [name for name in names if "layers." in name and f"layers.{place}." not in name]
        # the norm before a layer adds what the layer before it left
        assert all("layernorm" in name for name in others), others


@pytest.mark.slow
def test_parity_and_drift_are_made_in_slices_and_the_rest_says_why_not(tiny_build: Path, tiny_checkpoint: Path) -> None:
    options = VerifyOptions(window=64, windows_per_domain=1, resamples=100, layers_at_once=1)
    report = verify_artifact(
        tiny_build, tiny_checkpoint, None, LIMITS, level=Verification.NUMERICS_ON_CPU, options=options
    )
    found = {item.name: item for item in report.checks}
    assert found["graph_parity"].verdict is found["drift"].verdict is Verdict.PASS
    for name in ("kv_decode", "greedy"):
        assert found[name].verdict is Verdict.INCONCLUSIVE
        assert "larger than the memory" in found[name].detail
    assert report.verdict is Verdict.INCONCLUSIVE


def test_a_graph_without_layers_is_refused(tiny_build: Path) -> None:
    graph = Graph(tiny_build / "model.onnx")
    for node in graph.nodes:
        node.name = node.name.replace("layers.", "parts.")
    with pytest.raises(VerificationError, match="names no layers"):
        Cut(graph, 1)


def test_an_artifact_that_stays_mapped_is_sliced_where_memory_cannot_keep_it(
    tiny_build: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def layers(free: float) -> int | None:
        monkeypatch.setattr(context, "folder_bytes", lambda folder: 10_000_000_000)
        monkeypatch.setattr(context, "free_memory", lambda: int(free))
        level, options = Verification.RUN, VerifyOptions()
        one = context.Context(tiny_build, tiny_checkpoint, None, LIMITS, level, options, None, None, tmp_path)
        return one.slice_layers

    assert layers(10.8e9) is None
    assert layers(10.7e9) == 1
