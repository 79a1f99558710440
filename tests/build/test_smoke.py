"""The first look at what was built, and what `optimize` makes of an artifact that is larger than the memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qwen_onnx.artifact.manifest import open_artifact
from qwen_onnx.build import estimate, optimize
from qwen_onnx.build.optimize import Job, require_room
from qwen_onnx.build.smoke import smoke
from qwen_onnx.build.toolchain import Toolchain
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import Plan, make_plan
from qwen_onnx.catalog.schema import Verification
from qwen_onnx.errors import EnvironmentFault, ExportError
from qwen_onnx.records import Verdict
from qwen_onnx.sources.fetch import fetch
from qwen_onnx.verify.records import VerifyOptions
from qwen_onnx.verify.report import load_report


@pytest.fixture
def plan(repository: Path) -> Plan:
    return make_plan(load_catalog(repository), "starter", "cpu", "int4")


@pytest.fixture
def short_of_memory(plan: Plan, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much memory is free as the tiny model takes in slices, and no more."""
    needs = estimate.estimate(plan, tiny_checkpoint)
    assert needs.in_slices is not None
    assert needs.in_slices < needs.verification
    free = max(needs.in_slices, needs.memory)
    for module in (estimate, optimize):
        monkeypatch.setattr(module, "free_memory", lambda: free)


def tools(plan: Plan, folder: Path) -> Toolchain:
    return Toolchain.of(plan, folder / "cache")


def test_what_fits_is_loaded_whole(plan: Plan, tiny_build: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert smoke(tiny_build, tools(plan, tmp_path), tiny_checkpoint) is Verification.RUN


@pytest.mark.usefixtures("short_of_memory")
def test_what_does_not_fit_is_looked_at_in_slices(
    plan: Plan, tiny_build: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_build, tmp_path / "int4"))
    assert smoke(folder, tools(plan, tmp_path), tiny_checkpoint) is Verification.IN_SLICES
    assert [path.name for path in tmp_path.iterdir()] == ["int4"]
    longer = plan.model_copy(update={"context": 1 << 20})
    with pytest.raises(ExportError, match="the recipe promises 1048576"):
        smoke(folder, tools(longer, tmp_path), tiny_checkpoint)
    model = onnx.load(str(folder / "model.onnx"))
    norm = next(item for item in model.graph.initializer if "layers.1" in item.name and "layernorm" in item.name)
    norm.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(norm) * np.float32("nan"), norm.name))
    (folder / "model.onnx.data").unlink()
    onnx.save(model, str(folder / "model.onnx"), save_as_external_data=True, location="model.onnx.data")
    with pytest.raises(ExportError, match="logits that are no numbers"):
        smoke(folder, tools(plan, tmp_path), tiny_checkpoint)
    (folder / "model.onnx.data").write_bytes(b"")
    with pytest.raises(ExportError, match="does not load"):
        smoke(folder, tools(plan, tmp_path), tiny_checkpoint)


@pytest.mark.slow
@pytest.mark.usefixtures("short_of_memory")
def test_manifest_and_report_say_what_slices_prove(
    plan: Plan, tiny_build: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    artifact = open_artifact(Path(shutil.copytree(tiny_build, tmp_path / "int4")))
    checkpoint = fetch(plan, tmp_path / "cache", local=tiny_checkpoint)
    options = VerifyOptions(checks=("size", "latency"))
    report = optimize.verify_published(artifact, checkpoint, tmp_path / "cache", options)
    assert report.verification is Verification.IN_SLICES
    assert open_artifact(artifact.path).manifest.claim == report.claim == load_report(artifact.path).claim
    assert Verification.IN_SLICES.text in report.claim


@pytest.mark.release
@pytest.mark.usefixtures("short_of_memory")
def test_optimize_proves_in_slices_what_memory_does_not_hold(plan: Plan, tiny_checkpoint: Path, tmp_path: Path) -> None:
    job = Job(plan, tmp_path / "out/int4", tmp_path / "cache", tiny_checkpoint)
    built = optimize.optimize(job).artifact
    # a random model may miss a limit of the drift: then it is beside the target
    manifest, report = open_artifact(built.path).manifest, load_report(built.path)
    assert report.verification is Verification.IN_SLICES
    assert report.options.layers_at_once == 1
    verdicts = {item.name: item.verdict for item in report.checks}
    assert verdicts["graph_parity"] is verdicts["kv_decode"] is verdicts["greedy"] is Verdict.PASS
    assert "latency" in report.not_checked
    assert manifest.claim == report.claim
    assert Verification.IN_SLICES.text in manifest.claim
    assert manifest.verdict is report.verdict


def test_a_machine_that_holds_no_layer_is_refused_with_both_figures(
    plan: Plan, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = estimate.estimate(plan, tiny_checkpoint)
    job = Job(plan, tmp_path / "int4", tmp_path, tiny_checkpoint)
    monkeypatch.setattr(optimize, "free_memory", lambda: needs.least)
    require_room(job)
    monkeypatch.setattr(optimize, "free_memory", lambda: needs.least - 1)
    with pytest.raises(EnvironmentFault, match="GB of memory"):
        require_room(job)
