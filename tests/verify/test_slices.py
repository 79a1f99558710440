"""A graph in slices computes what the whole graph computes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qwen_onnx.catalog.schema import Limits, Verification
from qwen_onnx.errors import VerificationError
from qwen_onnx.export.passes.genai_builder.build import build
from qwen_onnx.export.passes.genai_builder.options import GenAIModelBuilderOptions
from qwen_onnx.runtime.engines.genai import Engine
from qwen_onnx.verify import Keep, Report, Verdict, VerifyOptions, verify_artifact
from qwen_onnx.verify.checks import SLICED_TOKENS
from qwen_onnx.verify.golden import GOLDEN, Golden
from qwen_onnx.verify.graph import Graph
from qwen_onnx.verify.records import TaskOptions
from qwen_onnx.verify.scoring import OnnxScorer
from qwen_onnx.verify.slices import Cut, SlicedScorer, decoded
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
    stepwise = decoded(Graph(folder / "model.onnx"), 1, layers, TEXTS, in_float32=in_float32)
    if in_float32:
        for ids, logits in zip(TEXTS, stepwise, strict=True):
            assert np.abs(logits - whole.logits(ids)).max() <= 1e-4
    return len(sliced.slices)


def test_slices_equal_the_whole(tiny_build: Path, tmp_path: Path) -> None:
    assert assert_equal(tiny_build, tmp_path, 1, in_float32=False) == 3
    assert assert_equal(tiny_build, tmp_path, 1, in_float32=True) == 3
    assert assert_equal(tiny_build, tmp_path / "all", 2, in_float32=False) == 2


def test_decoding_in_slices_equals_the_engine_that_serves(tiny_build: Path) -> None:
    engine = Engine(tiny_build, threads=1)
    for ids, logits in zip(TEXTS, decoded(Graph(tiny_build / "model.onnx"), 1, 1, TEXTS), strict=True):
        assert np.abs(logits - engine.forced_logits(ids[:1], ids[1:])).max() <= 1e-5


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


def in_slices(artifact: Path, checkpoint: Path, layers: int, *checks: str, **more: Any) -> Report:
    options = VerifyOptions(
        window=64, windows_per_domain=1, resamples=100, decode_tokens=16, layers_at_once=layers, checks=checks
    )
    return verify_artifact(artifact, checkpoint, None, LIMITS, options=options, **more)


@pytest.mark.slow
def test_an_artifact_is_proven_in_slices_and_the_report_claims_no_more(
    tiny_build: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    report = in_slices(tiny_build, tiny_checkpoint, 1, keep=Keep(tmp_path, "tiny", "0" * 64))
    found = {item.name: item for item in report.checks}
    assert {item.verdict for item in report.checks} == {Verdict.PASS}, found
    assert {"graph_parity", "drift", "kv_decode", "greedy"} <= set(found)
    assert float(found["kv_decode"].measured["fp32_kld"]) < 1e-6
    assert found["greedy"].measured["tokens"] == 2 * SLICED_TOKENS
    assert report.verdict is Verdict.PASS
    assert report.verification is Verification.IN_SLICES
    assert report.claim == f"proven: {Verification.IN_SLICES.text}"
    assert {"batched", "latency", "memory", "kv_int8"} <= set(report.not_checked)
    assert all("never loaded as a whole" in reason for reason in report.not_checked.values())
    assert report.options.layers_at_once == 1
    assert Golden.read(tmp_path / GOLDEN).about.model == "tiny"


def test_what_slices_cannot_show_is_not_passed_over(tiny_build: Path, tiny_checkpoint: Path) -> None:
    """Asked for by name it is no PASS; and what something else runs has no slices."""
    (latency,) = [
        item for item in in_slices(tiny_build, tiny_checkpoint, 1, "latency").checks if item.name == "latency"
    ]
    assert latency.verdict is Verdict.INCONCLUSIVE
    assert "never loaded as a whole" in latency.detail
    asked = VerifyOptions(layers_at_once=1, tasks=TaskOptions(names=("gsm8k",)))
    with pytest.raises(VerificationError, match="tasks cannot be checked: numerics and KV cache"):
        verify_artifact(tiny_build, tiny_checkpoint, None, LIMITS, options=asked)
    for more in ({"level": Verification.STRUCTURE}, {"level": Verification.SIMULATOR}, {"runner": lambda folder: None}):
        with pytest.raises(VerificationError, match="only what ONNX Runtime runs by itself can be run in slices"):
            in_slices(tiny_build, tiny_checkpoint, 1, **more)


def with_layers_that_take_each_others_keys(folder: Path) -> Path:
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    first, second = (node for node in graph.graph.node if node.op_type == "GroupQueryAttention")
    first.input[3], second.input[3] = second.input[3], first.input[3]
    onnx.save(graph, str(folder / "model.onnx"))
    return folder


@pytest.mark.parametrize("layers", [1, 2])
def test_a_wrong_kv_cache_is_found_in_slices(
    layers: int, tiny_build: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Nothing but decoding tells: the first token has no cache, nor has a run over all tokens."""
    broken = with_layers_that_take_each_others_keys(Path(shutil.copytree(tiny_build, tmp_path / "broken")))
    whole = [OnnxScorer(folder, 1, in_float32=True).logits(TEXTS[0]) for folder in (tiny_build, broken)]
    assert np.array_equal(*whole)
    (check,) = [
        item for item in in_slices(broken, tiny_checkpoint, layers, "kv_decode").checks if item.name == "kv_decode"
    ]
    assert check.verdict is Verdict.FAIL, check


def test_a_graph_without_layers_is_refused(tiny_build: Path) -> None:
    graph = Graph(tiny_build / "model.onnx")
    for node in graph.nodes:
        node.name = node.name.replace("layers.", "parts.")
    with pytest.raises(VerificationError, match="names no layers"):
        Cut(graph, 1)
