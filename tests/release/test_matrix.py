"""The matrix of a release: what it may say, and that every fault is told at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.errors import ConfigError
from qwen_onnx.release.matrix import SCHEMA_FILE, load_matrix
from tests.conftest import REPOSITORY, edit_yaml, run_cli

CATALOG = load_catalog(REPOSITORY)
ENTRY = {"models": ["starter"], "targets": ["cpu"], "packages": ["sdk2"], "memory": "8GB", "timeout": "45min"}


def written(folder: Path, *entries: dict[str, Any], **top: Any) -> Path:
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "matrix": list(entries), **top}))
    return path


def faults_of(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as told:
        load_matrix(CATALOG, path)
    return told.value.faults


def test_the_committed_matrix_builds_the_starter_twice() -> None:
    jobs = load_matrix(CATALOG)
    assert [job.name for job in jobs] == ["starter/cpu-int4", "starter/cpu-fp32"]
    assert {(job.memory, job.seconds) for job in jobs} == {(8 * 10**9, 45 * 60.0)}


def test_every_combination_is_a_job(tmp_path: Path) -> None:
    entry = ENTRY | {"models": ["starter", "qwen3-0.6b"], "targets": ["cpu", "cuda"], "packages": ["sdk2", "cli1"]}
    jobs = load_matrix(CATALOG, written(tmp_path, entry, version=3))
    assert [job.name for job in jobs] == [
        "starter/cpu-int4",
        "starter/cuda-int4",
        "qwen3-0.6b/cpu-int4",
        "qwen3-0.6b/cuda-int4",
    ]
    assert {(job.packages, job.version) for job in jobs} == {(("sdk2", "cli1"), 3)}


def test_faults_of_every_kind_are_told_together(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        ENTRY | {"gates": {"kldd": 0.1}, "memory": "much"},
        ENTRY | {"models": ["startr"]},
        ENTRY | {"targets": ["cpuu"]},
        ENTRY | {"precisions": ["fp16"]},
        ENTRY | {"precisions": ["int8"], "gates": {"kld_mean": 0.5, "top1": 0.5}},
        ENTRY | {"targets": ["npu-qnn"]},
    )
    told = "\n".join(faults_of(path))
    for fault in (
        f"{path}: matrix.0.gates.kldd: unknown key",
        f"{path}: matrix.0.memory: ",
        f"{path}: matrix.1: recipes/: no model 'startr'",
        f"{path}: matrix.2: pipelines/: no target 'cpuu'",
        f"{path}: matrix.3: pipelines/cpu.yaml: fp16 is unavailable",
        f"{path}: matrix.4.gates.kld_mean: 0.5 is looser than the target's own 0.005, for starter/cpu-int8",
        f"{path}: matrix.4.gates.top1: 0.5 is looser than the target's own 0.95, for starter/cpu-int8",
        f"{path}: matrix.5: no package for npu-qnn: onnxruntime-genai",
    ):
        assert fault in told, told


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"gates": {"kld_mean": 0.1800001}}, "looser"),
        ({"gates": {"decode_speedup": 2.9999999}}, "looser"),
        ({"gates": {"max_bytes": 115000001}}, "looser"),
        ({"gates": {"unverified": "allow", "top1": 0.9}}, "top1: nothing is measured"),
        ({"gates": {"unverified": "yes"}}, "gates.unverified"),
        ({"packages": []}, "packages"),
        ({"packages": ["sdk3"]}, "packages"),
        ({"timeout": "45"}, "timeout"),
        ({"models": ["starter", "starter"]}, "starter/cpu-int4: stands for two jobs"),
        ({"exclude": []}, "matrix.0.exclude: unknown key"),
    ],
)
def test_what_an_entry_may_not_say(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    told = faults_of(written(tmp_path, ENTRY | change))
    assert any(fault in line for line in told), told


TIGHT = {"kld_mean": 0.18}, {"kld_mean": 0.1}, {"decode_speedup": 3.5}, {"max_bytes": 10**8}


@pytest.mark.parametrize("gates", TIGHT)
def test_gates_that_are_as_tight_or_tighter(tmp_path: Path, gates: dict[str, float]) -> None:
    [job] = load_matrix(CATALOG, written(tmp_path, ENTRY | {"gates": gates}))
    assert job.gates.limits == gates


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("matrix: [", "not valid YAML"),
        ("- a", "Input should be"),
        ("version: 1\nversion: 2\nmatrix: []", "appears twice"),
        ("matrix: []", "matrix"),
        ("matrix: 1", "matrix"),
        ("", "Input should be"),
    ],
)
def test_files_that_are_no_matrix(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "matrix.yaml"
    path.write_text(text)
    assert any(fault in line for line in faults_of(path))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    assert "no such file" in faults_of(tmp_path / "none.yaml")[0]


@pytest.mark.slow
def test_the_schema_takes_and_refuses_the_same() -> None:
    import jsonschema  # it compiles a grammar of its formats for seconds, which each worker would wait for

    schema = json.loads((REPOSITORY / SCHEMA_FILE).read_text())
    data = yaml.safe_load((REPOSITORY / "pipelines/release.yaml").read_text())
    jsonschema.validate(data, schema)
    for spoilt in (data | {"typo": 1}, {**data, "matrix": [data["matrix"][0] | {"memory": "much"}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spoilt, schema)


@pytest.mark.slow
def test_plans_checks_the_matrix_and_its_schema(checkout: Path) -> None:
    edit_yaml(checkout / "pipelines/release.yaml", lambda data: data["matrix"][0]["models"].append("qwen9"))
    done = run_cli("plans", "--check", cwd=checkout)
    assert done.returncode == 2
    assert "pipelines/release.yaml: matrix.0: recipes/: no model 'qwen9'" in done.stderr
    (checkout / "pipelines/release.yaml").unlink()
    (checkout / SCHEMA_FILE).write_text("{}")
    done = run_cli("plans", "--check", cwd=checkout)
    assert f"{SCHEMA_FILE}: stale" in done.stderr
