"""The check of what is served at once: a graph whose rows look at each other is found, early or late."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qwen_onnx.catalog.schema import Limits, Verification
from qwen_onnx.export.passes.genai_builder.build import build
from qwen_onnx.export.passes.genai_builder.options import GenAIModelBuilderOptions
from qwen_onnx.records import Verdict
from qwen_onnx.runtime.engines.batch.layout import UnsupportedGraphError
from qwen_onnx.runtime.engines.batch.model import BatchModel
from qwen_onnx.verify import VerifyOptions, verify_artifact
from qwen_onnx.verify.records import CheckResult
from tests.fixtures.architectures import make_checkpoint

LIMITS = Limits(kld_mean=0.18, kld_p99=1.5, top1=0.5, ppl_ratio=1.2)


def judged(artifact: Path, checkpoint: Path) -> CheckResult:
    options = VerifyOptions(checks=("batched",), window=64)
    report = verify_artifact(artifact, checkpoint, None, LIMITS, level=Verification.RUN, options=options)
    return next(item for item in report.checks if item.name == "batched")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a size that lets every token look at those before it."""
    return make_checkpoint("Qwen2ForCausalLM", tmp_path_factory.mktemp("lively") / "checkpoint")


@pytest.fixture(scope="module")
def artifact(checkpoint: Path) -> Path:
    folder = checkpoint.parent / "fp32"
    build(checkpoint, folder, GenAIModelBuilderOptions(precision="fp32"))
    return folder


@pytest.fixture
def mixing(artifact: Path, tmp_path: Path) -> Callable[[int], Path]:
    """Makes a copy whose rows all take the longest row's length once that exceeds a number of tokens."""

    def make(beyond: int) -> Path:
        folder = Path(shutil.copytree(artifact, tmp_path / f"mixing{beyond}"))
        model = onnx.load(folder / "model.onnx")
        graph = model.graph
        attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
        lengths = attention[0].input[5]
        graph.initializer.append(numpy_helper.from_array(np.int32(beyond), "beyond"))
        added = [
            helper.make_node("ReduceMax", [lengths], ["longest"], keepdims=0),
            helper.make_node("Greater", ["longest", "beyond"], ["is_long"]),
            helper.make_node("Where", ["is_long", "longest", lengths], ["mixed"]),
        ]
        for node in attention:
            node.input[5] = "mixed"
        index = list(graph.node).index(attention[0])
        nodes = [*graph.node[:index], *added, *graph.node[index:]]
        del graph.node[:]
        graph.node.extend(nodes)
        onnx.save(model, folder / "model.onnx")
        return folder

    return make


@pytest.mark.slow
def test_independent_rows_pass(artifact: Path, checkpoint: Path) -> None:
    found = judged(artifact, checkpoint)
    assert found.verdict is Verdict.PASS
    assert found.measured["streams"] == 8


@pytest.mark.slow
def test_rows_that_mix_when_they_are_long_fail(mixing: Callable[[int], Path], checkpoint: Path) -> None:
    assert judged(mixing(20), checkpoint).verdict is Verdict.FAIL


@pytest.mark.slow
def test_rows_that_mix_from_the_start_are_never_batched(mixing: Callable[[int], Path], checkpoint: Path) -> None:
    folder = mixing(0)
    with pytest.raises(UnsupportedGraphError, match="not independent"):
        BatchModel(folder, rows=2, capacity=64)
    found = judged(folder, checkpoint)
    assert found.verdict is Verdict.PASS
    assert found.detail.startswith("served one request at a time")
