"""Every target's graph, built from a tiny model on this machine and judged on the CPU execution provider."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import Plan, make_plan
from qwen_onnx.catalog.schema import Limits, Verification
from qwen_onnx.errors import ArtifactError, ExportError
from qwen_onnx.export.passes.genai_builder.qdq import write_signed
from qwen_onnx.export.readback.onnx import compare, read_graph
from qwen_onnx.runtime.engines.genai import Engine
from qwen_onnx.verify import Report, Verdict, VerifyOptions, verify_artifact
from tests.conftest import REPOSITORY, make_tiny_checkpoint

CATALOG = load_catalog(REPOSITORY)
# each target is one process of genai's builder and a minute with what follows
pytestmark = pytest.mark.slow
INT4 = [(name, "int4") for name, pipeline in CATALOG.pipelines.items() if pipeline.device == "gpu"]
OTHERS = [
    (name, precision)
    for name, pipeline in CATALOG.pipelines.items()
    for precision in pipeline.precisions
    # what needs an environment of its own has tests of its own
    if precision != "int4" and pipeline.environment is None
]
# a random model's predictions are nearly uniform: its top-1 says little, and no damage makes a large divergence
LIMITS = Limits(kld_mean=0.005, kld_p99=0.05, top1=0.01, ppl_ratio=1.05)
FAST = {"window": 64, "windows_per_domain": 1, "decode_tokens": 16, "greedy_tokens": 8, "block": 16, "resamples": 100}
PROGRAM = """
import json, sys
from pathlib import Path
from qwen_onnx.export.passes.genai_builder.build import build
from qwen_onnx.export.passes.fisher_gptq import quantize as fisher
from qwen_onnx.export.passes.gptq.quantize import quantize
from qwen_onnx.catalog.registry import passes
source, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
run = {"FisherGptq": fisher.quantize, "CalibratedGptq": quantize, "GenAIModelBuilder": build}
for folder, steps in jobs.items():
    current = source
    for name, step in steps.items():
        kind = step.pop("type")
        output = Path(folder) / name
        run[kind](current, output, passes()[kind].model_validate(step))
        current = output
"""
SMALL = {"windows": 4, "window": 64}


def plan_of(target: str, precision: str) -> Plan:
    return make_plan(CATALOG, "starter", target, precision)


def steps_of(plan: Plan) -> dict[str, dict[str, object]]:
    """The plan's own steps, with fewer calibration windows."""
    steps = {name: dict(step) for name, step in plan.olive["passes"].items()}
    for step in steps.values():
        if step["type"] in {"FisherGptq", "CalibratedGptq"}:
            step.update(SMALL)
    return steps


def build_all(checkpoint: Path, root: Path, builds: list[tuple[str, str]]) -> Callable[[str, str], Path]:
    """All builds, made in one process of their own: genai's builder changes global state."""
    jobs = {str(root / f"{target}-{precision}"): steps_of(plan_of(target, precision)) for target, precision in builds}
    command = [sys.executable, "-c", PROGRAM, str(checkpoint), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return lambda target, precision: root / f"{target}-{precision}" / "build"


@pytest.fixture(scope="module")
def built(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The int4 graph of every GPU target, and one in fp16."""
    return build_all(tiny_checkpoint, tmp_path_factory.mktemp("int4"), [*INT4, ("cuda", "fp16")])


@pytest.fixture(scope="module")
def others(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The graphs of all other precisions."""
    return build_all(tiny_checkpoint, tmp_path_factory.mktemp("others"), OTHERS)


def judged(artifact: Path, checkpoint: Path, *checks: str) -> Report:
    options = VerifyOptions(checks=checks, **FAST)
    return verify_artifact(artifact, checkpoint, None, LIMITS, level=Verification.NUMERICS_ON_CPU, options=options)


def verdicts(report: Report, *names: str) -> set[Verdict]:
    return {item.verdict for item in report.checks if item.name in names}


@pytest.mark.parametrize(("target", "precision"), INT4)
def test_int4_graphs_are_what_was_asked_for_and_compute_what_pytorch_does(
    built: Callable[[str, str], Path], tiny_checkpoint: Path, target: str, precision: str
) -> None:
    artifact = built(target, precision)
    compare(read_graph(artifact / "model.onnx"), plan_of(target, precision).readback)
    report = judged(artifact, tiny_checkpoint, "drift", "kv_decode", "greedy")
    assert verdicts(report, "drift", "greedy") == {Verdict.PASS}
    decode = next(item for item in report.checks if item.name == "kv_decode")
    assert decode.measured["kld_mean"] < 0.001
    assert "latency" in report.not_checked


@pytest.mark.release
@pytest.mark.parametrize(("target", "precision"), OTHERS)
def test_other_precisions(
    others: Callable[[str, str], Path], tiny_checkpoint: Path, target: str, precision: str
) -> None:
    artifact, plan = others(target, precision), plan_of(target, precision)
    compare(read_graph(artifact / "model.onnx"), plan.readback)
    report = judged(artifact, tiny_checkpoint, "drift", "greedy")
    assert verdicts(report, "drift", "greedy") == {Verdict.PASS}
    assert report.drift
    assert report.drift.kld_mean.upper <= plan.limits.kld_mean


def test_another_targets_graph_is_found_out(built: Callable[[str, str], Path]) -> None:
    with pytest.raises(ExportError, match="provider is cuda, asked dml"):
        compare(read_graph(built("cuda", "int4") / "model.onnx"), plan_of("dml", "int4").readback)
    with pytest.raises(ExportError, match=r"inputs and outputs have \[16\] bits, asked 32"):
        compare(read_graph(built("cuda", "fp16") / "model.onnx"), plan_of("webgpu", "fp32").readback)
    with pytest.raises(ExportError, match="is a float MatMul of 16 bits"):
        compare(read_graph(built("cuda", "fp16") / "model.onnx"), plan_of("cuda", "int4").readback)
    with pytest.raises(ExportError, match="form is QDQ"):
        compare(read_graph(built("trt-rtx", "int4") / "model.onnx"), plan_of("cuda", "int4").readback)
    with pytest.raises(ExportError, match="no weights in the form QDQ"):
        compare(read_graph(built("cuda", "fp16") / "model.onnx"), plan_of("trt-rtx", "int4").readback)


def test_tensorrt_keeps_some_matrices_in_half_precision(built: Callable[[str, str], Path]) -> None:
    """Those that rounding harms most: as many as the plan's bits pay for, and only where the plan says so."""
    asked, facts = plan_of("trt-rtx", "int4").readback, read_graph(built("trt-rtx", "int4") / "model.onnx")
    floats = [name for name in facts["floats"] if "lm_head" not in name]
    assert 0 < len(floats) < len(facts["nodes"])
    with pytest.raises(ExportError, match=f"{floats[0]} is a float MatMul of 16 bits"):
        compare(facts, asked.model_copy(update={"float_bits": None}))


def test_tensorrt_gets_signed_codes(built: Callable[[str, str], Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As genai writes them, unsigned codes declared as INT4, the drift finds out."""
    folder = Path(shutil.copytree(built("trt-rtx", "int4"), tmp_path / "unsigned"))
    assert write_signed(folder / "model.onnx") > 0  # once more: back to what genai wrote
    report = judged(folder, tiny_checkpoint, "drift")
    assert next(item.verdict for item in report.checks if item.name == "drift") is Verdict.FAIL


def test_without_its_provider_an_artifact_says_what_it_needs(built: Callable[[str, str], Path]) -> None:
    with pytest.raises(ArtifactError, match="serve it where onnxruntime-genai has cuda"):
        Engine(built("cuda", "int4"))
    tokens = Engine(built("cuda", "int4"), on_cpu=True).generate([3, 4, 5], max_new_tokens=3, stop_on_eos=False)
    assert len(list(tokens)) == 3


def test_directml_has_no_operator_that_it_lacks(built: Callable[[str, str], Path]) -> None:
    """GatherBlockQuantized on the CPU would forbid the graph capture that genai_config.json asks for."""
    counts = read_graph(built("dml", "int4") / "model.onnx")["counts"]
    assert "GatherBlockQuantized" not in counts
    assert "GatherBlockQuantized" in read_graph(built("cuda", "int4") / "model.onnx")["counts"]


@pytest.mark.parametrize("target", ["cuda", pytest.param("webgpu", marks=pytest.mark.release)])
def test_qwen3_norms_stay_outside_of_attention(target: str, tmp_path: Path) -> None:
    """The CPU's GroupQueryAttention refuses them, so that nothing could be judged here."""
    checkpoint = make_tiny_checkpoint(tmp_path / "qwen3", kind="qwen3")
    steps = steps_of(plan_of(target, "fp16"))
    command = [sys.executable, "-c", PROGRAM, str(checkpoint), json.dumps({str(tmp_path / "out"): steps})]
    subprocess.run(command, capture_output=True, check=True)
    report = judged(tmp_path / "out/build", checkpoint, "drift")
    assert report.drift
    assert report.drift.kld_mean.upper <= 0.0005
