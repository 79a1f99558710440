"""Our passes are found by walking their folders; what a pipeline may say of them costs no heavy import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import make_plan
from qwen_onnx.catalog.registry import passes
from qwen_onnx.export.olive import reference_config
from tests.conftest import REPOSITORY

CATALOG = load_catalog(REPOSITORY)


def test_every_folder_is_a_pass(repository: Path) -> None:
    folders = {path.parent.name for path in (repository / "qwen_onnx/export/passes").glob("*/__init__.py")}
    found = {options.__module__.split(".")[-2]: name for name, options in passes().items()}
    assert set(found) == folders
    assert len(found) == 13
    assert found["gptq"] == "CalibratedGptq"


@pytest.mark.parametrize("name", sorted(passes()))
def test_the_options_name_a_class_that_is_there(name: str, repository: Path) -> None:
    source = repository / f"{passes()[name].module().replace('.', '/')}.py"
    classes = {node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)}
    assert name in classes


def test_reading_the_options_loads_nothing_heavy() -> None:
    code = "from qwen_onnx.catalog.registry import passes; passes(); import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "qwen_onnx.export.passes.gptq.options" in done.stdout.split()
    assert not set(done.stdout.split()) & {"torch", "olive", "transformers", "onnx", "numpy", "onnxruntime"}


@pytest.mark.parametrize(
    ("target", "steps"),
    [
        ("cpu", [{"type": "GenAIModelBuilder", "precision": "fp32"}]),
        # a stock graph for the CPU, whatever the target's provider
        ("cuda", [{"type": "GenAIModelBuilder", "precision": "fp32"}]),
        ("npu-qnn", [{"type": "HtpQdqExport", "form": "float", "context": 1024}]),
        ("npu-openvino", [{"type": "OpenVINOConversion", "precision": "fp32"}, {"type": "OpenVINOPackage"}]),
    ],
)
def test_the_reference_is_made_of_the_steps_that_have_a_form_without_quantisation(
    target: str, steps: list[dict[str, object]]
) -> None:
    made = list(reference_config(make_plan(CATALOG, "starter", target).olive)["passes"].values())
    assert len(made) == len(steps)
    for step, wanted in zip(made, steps, strict=True):
        assert wanted.items() <= step.items()
    if target in ("cpu", "cuda"):
        assert made == steps


def test_an_fp32_export_is_needed_where_the_graph_is_not_the_checkpoints_with_rounded_matrices() -> None:
    for target, needed in (
        ("cpu", False),
        ("cuda", False),
        ("trt-rtx", False),
        ("npu-qnn", True),
        ("npu-openvino", True),
    ):
        assert make_plan(CATALOG, "starter", target).needs_reference is needed, target
    plan = make_plan(CATALOG, "starter", "cpu")
    turned = {"turn": {"type": "RotateResidual"}, **plan.olive["passes"]}
    assert plan.model_copy(update={"olive": {**plan.olive, "passes": turned}}).needs_reference
