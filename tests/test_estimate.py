"""What is predicted before a build is what the build then takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_onnx.catalog import load_catalog
from qwen_onnx.estimate import Estimate, dimensions, estimate
from qwen_onnx.plan import Plan, make_all_plans, make_plan
from tests.conftest import run_cli

TOLERANCE = 0.10


def plan_of(repository: Path, model: str) -> Plan:
    return make_plan(load_catalog(repository), model, "cpu")


def test_the_weights_are_those_that_the_row_counts(repository: Path) -> None:
    for model in ("qwen3-0.6b", "qwen2.5-0.5b-instruct", "qwen2.5-72b-instruct", "qwen3-32b"):
        plan = plan_of(repository, model)
        assert dimensions(plan).weights == pytest.approx(plan.parameters, rel=0.02), model


def test_every_row_has_an_estimate(repository: Path) -> None:
    catalog = load_catalog(repository)
    rows = [row for _, row in catalog.rows.values() if not row.planned]
    assert len(rows) > 50
    for row in rows:
        found = estimate(make_plan(catalog, row.id, "cpu"))
        assert 0.3 * (row.parameters or 0) < found.artifact < 2 * (row.parameters or 0), row.id
        assert found.disk > found.artifact
        assert found.memory > 600_000_000


def test_every_row_of_the_htp_has_an_estimate(repository: Path) -> None:
    catalog = load_catalog(repository)
    plans = [plan for plan in make_all_plans(catalog) if plan.target == "npu-qnn"]
    assert len(plans) > 30
    for plan in plans:
        # the weights stand in three places
        least, most = (1.5, 4.5) if plan.precision == "int4" else (2.5, 6)
        assert least * plan.parameters < estimate(plan).artifact < most * plan.parameters, plan.name


def test_a_local_checkpoint_counts_instead_of_the_row(repository: Path, tiny_checkpoint: Path) -> None:
    local = estimate(plan_of(repository, "qwen2.5-72b-instruct"), tiny_checkpoint)
    # the tables of rotary embeddings have the length of the plan's context
    assert local.artifact < 10_000_000
    assert local.download == 0


def test_the_command_prints_a_table_and_a_line_of_json(tiny_checkpoint: Path) -> None:
    done = run_cli("plan", "qwen3-0.6b", "--estimate")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert set(figures) == set(Estimate.__dataclass_fields__)
    assert figures["exact"]
    assert "memory, peak of the build" in done.stdout
    refused = run_cli("plan", "qwen3-0.6b", "--source", tiny_checkpoint)
    assert refused.returncode == 2
    assert "--estimate" in refused.stderr


def test_the_artifact_of_the_tiny_checkpoint(repository: Path, tiny_checkpoint: Path, tiny_build: Path) -> None:
    predicted = estimate(plan_of(repository, "starter"), tiny_checkpoint).artifact
    assert predicted == pytest.approx(sum(path.stat().st_size for path in tiny_build.iterdir()), rel=TOLERANCE)


# the aim is a tenth for all three, reached for the artifact alone (docs/lab-log.md); peaks are sampled and vary
REACHED = {"artifact": 0.10, "disk": 0.40, "memory": 0.40}


def assert_predicts(predicted: Estimate, measured: dict[str, int]) -> None:
    keys = {"artifact": "artifact_bytes", "disk": "disk_bytes", "memory": "anonymous_bytes"}
    off = {name: (getattr(predicted, name), measured[key]) for name, key in keys.items()}
    assert all(abs(guess - true) <= REACHED[name] * true for name, (guess, true) in off.items()), off


@pytest.mark.slow
def test_the_build_of_the_starter(repository: Path, starter_checkpoint: Path, tmp_path: Path) -> None:
    from qwen_onnx.export.memory_benchmark import measure

    plan = plan_of(repository, "starter")
    measured = measure(starter_checkpoint, tmp_path, plan.olive)
    assert_predicts(estimate(plan, starter_checkpoint, verify=False), measured)


@pytest.mark.slow
def test_memory_of_a_build_keeps_to_its_bound(repository: Path, tmp_path: Path) -> None:
    """With the whole model in memory 0.6 GB of bfloat16 take more than 4 GB."""
    from qwen_onnx.export.memory_benchmark import BOUND, measure, olive_config
    from qwen_onnx.export.synthetic import Size, write_checkpoint

    size = Size(hidden=1024, intermediate=3072, layers=20, heads=8, kv_heads=8, vocabulary=16384)
    checkpoint = tmp_path / "checkpoint"
    assert write_checkpoint(checkpoint, size, shard=100_000_000) > 550_000_000
    config = olive_config({})
    measured = measure(checkpoint, tmp_path, config)
    largest = size.vocabulary * size.hidden
    assert measured["anonymous_bytes"] <= BOUND + 4 * largest
    plan = plan_of(repository, "qwen3-0.6b").model_copy(update={"olive": config, "context": 8192})
    assert_predicts(estimate(plan, checkpoint, verify=False), measured)
