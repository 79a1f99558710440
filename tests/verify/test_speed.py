"""How near an artifact is to memory's limit, PyTorch timed by its layers, and the gate on memory."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwen_onnx.artifact.folded import Folded
from qwen_onnx.catalog.schema import Limits
from qwen_onnx.errors import VerificationError
from qwen_onnx.verify import VerifyOptions, latency, layerwise, verify_artifact
from qwen_onnx.verify.latency_worker import load
from qwen_onnx.verify.layerwise import LayerTimer
from qwen_onnx.verify.records import Latency
from qwen_onnx.verify.roofline import bandwidth, bytes_per_token, weights_read
from qwen_onnx.verify.timed import Timed

LIMITS = {"kld_mean": 0.18, "kld_p99": 1.5, "top1": 0.5, "ppl_ratio": 1.2}
FAST = {"prompt_tokens": 16, "new_tokens": 9, "segment": 4, "rounds": 1, "prefill_pairs": 1, "threads": 1}


def initializer(name: str, *dims: int) -> TensorProto:
    return numpy_helper.from_array(np.zeros(dims, np.uint8), name)


def read(nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto]) -> int:
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], weights))
    return weights_read(model.graph, Folded(model, Path("model.onnx"), VerificationError))


def test_a_token_reads_the_weights_but_not_the_table() -> None:
    nodes = [
        helper.make_node("GatherBlockQuantized", ["table", "ids", "scales"], ["x"], domain="com.microsoft"),
        helper.make_node("MatMulNBits", ["x", "body", "scales"], ["y"], domain="com.microsoft"),
        helper.make_node("QMoE", ["y", "router", "experts"], ["z"], domain="com.microsoft", k=2),
        helper.make_node("MatMulNBits", ["z", "head"], ["logits"], domain="com.microsoft"),
    ]
    weights = [
        initializer("table", 1000, 10),
        initializer("scales", 7),
        initializer("body", 30, 20),
        initializer("experts", 8, 16, 10),
        initializer("head", 50, 10),
    ]
    assert read(nodes, weights) == 7 + 600 + 8 * 16 * 10 * 2 // 8 + 500


def test_a_table_that_is_the_head_too_is_read() -> None:
    nodes = [
        helper.make_node("Gather", ["shared", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "shared"], ["logits"]),
    ]
    assert read(nodes, [initializer("shared", 100, 10)]) == 1000


def test_the_bytes_of_an_artifact_are_those_of_its_weights(tiny_artifact: Path) -> None:
    stored = sum(path.stat().st_size for path in tiny_artifact.glob("model.onnx*"))
    graph = onnx.load(str(tiny_artifact / "model.onnx"), load_external_data=False).graph
    assert 0.3 * stored < bytes_per_token(tiny_artifact) < stored
    assert any(node.op_type == "MatMulNBits" for node in graph.node)


def test_memory_gives_bytes() -> None:
    assert 1e8 < bandwidth(1, rounds=1) < 1e13


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by one second whenever somebody looks."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))


@pytest.mark.usefixtures("ticking")
def test_one_layer_counts_as_often_as_the_model_has_it(tiny_checkpoint: Path) -> None:
    """A pass: looked at before it, before and after the one layer, after it. Two layers: one second more."""
    engine = LayerTimer(tiny_checkpoint, 1)
    assert engine.prefill([1, 2, 3], 3) == 3 + 1
    assert engine.decode(2) == 5 + 2 * 1
    assert "1 of 2 layers" in engine.computed


def test_its_memory_is_that_of_all_weights(tiny_checkpoint: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    half = sum(parameter.numel() for parameter in whole.model.layers[0].parameters())
    assert LayerTimer(tiny_checkpoint, 1).peak_memory(1000) == 1000 + 4 * half


@pytest.mark.usefixtures("ticking")
def test_a_part_of_a_large_head_counts_for_all_of_it(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is looked at before and after the head as well; the model has the layer twice and the part 16 times."""
    config = AutoConfig.from_pretrained(tiny_checkpoint)
    rows = config.vocab_size // 16
    monkeypatch.setattr(layerwise, "HEAD_BYTES", 4 * config.hidden_size * rows)
    whole = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    engine = LayerTimer(tiny_checkpoint, 1)
    more = config.vocab_size / rows - 1
    # ids beyond the rows that are there
    assert engine.prefill([1, config.vocab_size - 1, 3], 3) == pytest.approx(5 + 1 + more)
    assert engine.decode(2) == pytest.approx(9 + 2 * (1 + more))
    assert f"{rows:,} of the head's {config.vocab_size:,} rows" in engine.computed
    kept = sum(parameter.numel() for parameter in whole.model.layers[0].parameters())
    kept += rows * config.hidden_size + config.hidden_size
    assert engine.peak_memory(1000) == 1000 + 4 * (sum(item.numel() for item in whole.parameters()) - kept)


def test_layers_of_each_kind_are_kept(tmp_path: Path) -> None:
    """Layers 0 and 2 are dense, 1 and 3 mixtures."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0, 2],
    )
    config.save_pretrained(tmp_path)
    engine = LayerTimer(tmp_path, 1)
    assert engine.repeats == [2, 2]
    with torch.device("meta"):
        whole = Qwen3MoeForCausalLM(config)
    kept = 2 * sum(parameter.numel() for index in (0, 1) for parameter in whole.model.layers[index].parameters())
    layers = sum(parameter.numel() for parameter in whole.model.layers.parameters())
    assert kept == layers
    assert engine.prefill([1, 2], 2) > 0
    assert engine.decode(1) > 0


def test_an_engine_that_ends_early_is_an_error() -> None:
    engine = Timed(lambda ids, count: iter(range(2)))
    engine.prefill([1], 3)
    with pytest.raises(RuntimeError, match="1 tokens instead of 2"):
        engine.decode(2)


def test_the_worker_knows_its_engines(tiny_checkpoint: Path) -> None:
    assert not load("pytorch", tiny_checkpoint, 1).computed
    assert load("layerwise", tiny_checkpoint, 1).computed


def test_pytorch_goes_by_layers_where_it_does_not_fit(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = VerifyOptions()
    assert latency._baseline_engine(tiny_checkpoint, tiny_checkpoint, options) == "pytorch"
    monkeypatch.setattr(latency, "pytorch_bytes", lambda _: 1 << 50)
    assert latency._baseline_engine(tiny_checkpoint, tiny_checkpoint, options) == "layerwise"


@pytest.mark.release
def test_the_report_says_what_was_computed_and_how_near_the_limit_it_is(
    tiny_artifact: Path, tiny_checkpoint: Path
) -> None:
    options = VerifyOptions(checks=("latency", "memory"), pytorch="layerwise", **FAST)
    report = verify_artifact(tiny_artifact, tiny_checkpoint, None, Limits(**LIMITS, max_memory=50.0), options=options)
    found = {item.name: item for item in report.checks}
    assert isinstance(report.latency, Latency)
    assert "1 of 2 layers" in found["latency"].detail
    assert 0 < float(found["latency"].measured["share_of_limit"]) < 1
    assert found["memory"].verdict == "PASS"
    assert "of the most that memory allows" in report.html()
    assert "1 of 2 layers" in report.html()
    strict = verify_artifact(tiny_artifact, tiny_checkpoint, None, Limits(**LIMITS, max_memory=0.01), options=options)
    assert {item.name: item for item in strict.checks}["memory"].verdict == "FAIL"


@pytest.mark.slow
def test_the_page_shows_drift_without_speed(tiny_artifact: Path, tiny_checkpoint: Path) -> None:
    options = VerifyOptions(checks=("drift",), window=32, windows_per_domain=1, resamples=100, block=16)
    report = verify_artifact(tiny_artifact, tiny_checkpoint, None, Limits(**LIMITS), options=options)
    assert report.drift is not None
    assert "of the most that memory allows" not in report.html()
