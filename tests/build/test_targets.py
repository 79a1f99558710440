"""Targets: each is built in a precision or says why not, and claims no more than its verification level."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_onnx.catalog.generated import committed_files
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import make_plan
from qwen_onnx.catalog.schema import Readback, Verification
from qwen_onnx.errors import ConfigError
from tests.conftest import edit_int4, edit_yaml

TARGETS = {"cpu", "cuda", "dml", "webgpu", "trt-rtx", "npu-openvino", "npu-qnn", "npu-vitisai"}
REASON = "a reason that is long enough"


def test_all_targets_are_there_and_only_the_cpu_is_run(repository: Path) -> None:
    pipelines = load_catalog(repository).pipelines
    assert set(pipelines) == TARGETS
    built = {name for name, pipeline in pipelines.items() if pipeline.precisions}
    assert built >= {"cpu", "cuda", "dml", "webgpu", "trt-rtx"}
    assert {name for name in built if pipelines[name].verification is Verification.RUN} == {"cpu"}
    assert {pipelines[name].default for name in built} == {"int4"}


def test_a_precision_without_build_or_reason_is_a_fault(checkout: Path) -> None:
    edit_yaml(checkout / "pipelines/webgpu.yaml", lambda d: d["precisions"].pop("fp32"))
    with pytest.raises(ConfigError, match="fp32: must stand in exactly one of `precisions` and `unavailable`"):
        load_catalog(checkout)


def test_a_precision_with_both_is_a_fault(checkout: Path) -> None:
    edit_yaml(checkout / "pipelines/webgpu.yaml", lambda d: d["unavailable"].update(fp32=REASON))
    with pytest.raises(ConfigError, match="fp32: must stand in exactly one"):
        load_catalog(checkout)


@pytest.mark.parametrize("level", ["simulated", "", None])
def test_a_target_states_its_level(checkout: Path, level: str | None) -> None:
    edit_yaml(checkout / "pipelines/cuda.yaml", lambda d: d.update(verification=level))
    with pytest.raises(ConfigError, match=r"cuda\.yaml: verification"):
        load_catalog(checkout)


@pytest.mark.parametrize("limit", ["decode_speedup", "prefill_speedup"])
def test_no_speed_is_promised_where_nothing_runs(checkout: Path, limit: str) -> None:
    edit_int4(checkout / "pipelines/cuda.yaml", lambda d: d["limits"].update({limit: 2.0}))
    with pytest.raises(ConfigError, match=rf"limits\.{limit}: the target is not run here"):
        make_plan(load_catalog(checkout), "starter", "cuda")
    assert make_plan(load_catalog(checkout), "starter", "cuda", "fp16").limits.decode_speedup is None


def test_no_row_adds_a_speed_either(checkout: Path) -> None:
    override = {"cuda": {"why": REASON, "precisions": ["int4"], "set": {"limits.decode_speedup": 2.0}}}
    edit_yaml(checkout / "recipes/starter.yaml", lambda d: d["sizes"][0].update(targets=override))
    with pytest.raises(ConfigError, match="not run here"):
        make_plan(load_catalog(checkout), "starter", "cuda")


def test_the_builder_builds_for_the_target(checkout: Path) -> None:
    edit_int4(checkout / "pipelines/cuda.yaml", lambda d: d["steps"][-1]["config"].update(execution_provider="dml"))
    with pytest.raises(ConfigError, match="dml is not the target's CUDAExecutionProvider"):
        make_plan(load_catalog(checkout), "starter", "cuda")


def test_precisions_have_plans_of_their_own(repository: Path) -> None:
    catalog = load_catalog(repository)
    plans = [make_plan(catalog, "starter", "webgpu", name) for name in ("int4", "int8", "fp16", "fp32")]
    assert len({plan.digest for plan in plans}) == 4
    assert [plan.name for plan in plans] == [f"starter/webgpu-{name}" for name in ("int4", "int8", "fp16", "fp32")]
    assert [plan.limits.kld_mean for plan in plans] == [0.18, 0.005, 0.0005, 0.000001]
    assert make_plan(catalog, "starter", "webgpu") == plans[0]


def test_an_override_may_be_for_one_precision(repository: Path) -> None:
    catalog = load_catalog(repository)
    for precision in ("int4", "int6"):
        assert make_plan(catalog, "starter", "cpu", precision).limits.max_bytes == 115_000_000
    assert make_plan(catalog, "starter", "cpu", "fp32").limits.max_bytes is None


def test_an_override_reaches_every_precision_that_has_the_field(checkout: Path) -> None:
    override = {"cpu": {"why": REASON, "set": {"steps.quantize.damp": 0.05}}}
    edit_yaml(checkout / "recipes/starter.yaml", lambda d: d["sizes"][0].update(targets=override))
    catalog = load_catalog(checkout)
    for precision in ("int4", "int6", "int8"):
        assert make_plan(catalog, "starter", "cpu", precision).olive["passes"]["quantize"]["damp"] == 0.05
    assert "quantize" not in make_plan(catalog, "starter", "cpu", "fp32").olive["passes"]


def test_an_override_of_a_precision_that_lacks_the_field_is_a_fault(checkout: Path) -> None:
    override = {"cpu": {"why": REASON, "precisions": ["fp32"], "set": {"steps.quantize.damp": 0.05}}}
    edit_yaml(checkout / "recipes/starter.yaml", lambda d: d["sizes"][0].update(targets=override))
    with pytest.raises(ConfigError, match=r"steps\.quantize\.damp: matches nothing"):
        make_plan(load_catalog(checkout), "starter", "cpu")


def test_an_excluded_target_is_refused_with_its_reason(checkout: Path) -> None:
    excluded = "the widest layer does not fit a buffer"
    edit_yaml(
        checkout / "recipes/starter.yaml", lambda d: d["sizes"][0].update(targets={"webgpu": {"excluded": excluded}})
    )
    catalog = load_catalog(checkout)
    with pytest.raises(ConfigError, match=rf"starter is not built for webgpu: {excluded}") as caught:
        make_plan(catalog, "starter", "webgpu")
    assert caught.value.exit_code == 2
    files = committed_files(catalog)
    assert f"starter webgpu - {excluded}\n" in files["recipes/plans.lock"]
    assert "starter webgpu int4" not in files["recipes/plans.lock"]
    assert "tests/golden/starter-webgpu.json" not in files
    assert "webgpu" not in catalog.targets_of(catalog.row("starter")[1])


@pytest.mark.parametrize(
    "override", [{"why": REASON}, {"set": {"limits.top1": 0.5}}, {}, {"excluded": REASON, "set": {"limits.top1": 0.5}}]
)
def test_an_override_changes_or_excludes(checkout: Path, override: dict[str, object]) -> None:
    edit_yaml(checkout / "recipes/starter.yaml", lambda d: d["sizes"][0].update(targets={"cpu": override}))
    with pytest.raises(ConfigError, match=r"excluded|go together"):
        load_catalog(checkout)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"form": "QDQ", "body_bits": 4, "head_bits": 16, "block_size": 32}, "symmetric: missing"),
        ({"form": "float", "body_bits": 16, "head_bits": 16, "block_size": 32}, "block_size: has no meaning"),
        ({"form": "float", "body_bits": 4, "head_bits": 16}, "4 bits are not float weights"),
        ({"body_bits": 4, "head_bits": 8, "block_size": 32, "symmetric": True}, "accuracy_level: missing"),
    ],
)
def test_what_is_read_back_fits_the_form_of_the_weights(fields: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Readback.model_validate(fields)


@pytest.mark.parametrize("level", list(Verification))
def test_only_a_pass_is_called_proven(level: Verification) -> None:
    assert level.claim("PASS") == f"proven: {level.text}"
    for verdict in ("FAIL", "INCONCLUSIVE", "UNVERIFIED"):
        assert level.claim(verdict).startswith(f"not proven ({verdict})")
    assert ("not run on the device" in level.text or "never run" in level.text) == (level is not Verification.RUN)


def test_a_model_that_is_too_large_for_a_build_is_refused_with_the_reason(repository: Path) -> None:
    catalog = load_catalog(repository)
    _, row = catalog.row("qwen2.5-7b-instruct")
    assert "npu-qnn" not in catalog.targets_of(row)
    with pytest.raises(ConfigError, match=r"not built for npu-qnn: one HTP context .* 4\.5B weights"):
        make_plan(catalog, "qwen2.5-7b-instruct", "npu-qnn")
    _, row = catalog.row("qwen3-4b")
    assert catalog.precisions_of(row, "npu-qnn") == ["int4"]
    with pytest.raises(
        ConfigError, match=r"has no int8 for npu-qnn: one HTP context is below 3.5 GiB .* 3\.3B weights"
    ):
        make_plan(catalog, "qwen3-4b", "npu-qnn", "int8")
    assert "qwen3-4b npu-qnn int8 - one HTP context is below" in committed_files(catalog)["recipes/plans.lock"]


def test_the_context_of_fixed_shapes_is_the_targets(repository: Path) -> None:
    plan = make_plan(load_catalog(repository), "starter", "npu-qnn")
    assert plan.context == plan.olive["passes"]["export"]["context"] == 1024
    assert plan.readback.soc_model == plan.olive["passes"]["compile"]["soc_model"]
