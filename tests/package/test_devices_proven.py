"""What a run on a device proved travels in the package, if it is of these bytes and a PASS."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.artifact.manifest import MANIFEST, open_artifact
from qwen_onnx.artifact.seal import runnable_digest
from qwen_onnx.errors import PackageError
from qwen_onnx.files import sha256_of
from qwen_onnx.package.build import PackageJob, build_package
from qwen_onnx.package.devices_proven import record_faults
from qwen_onnx.package.verify import verify_package
from qwen_onnx.records import Verdict, digest_of
from qwen_onnx.verify.device import DeviceReport
from qwen_onnx.verify.records import CheckResult
from tests.package.conftest import edit_json

RECORD = "device-webgpu.json"


def report(artifact: Path, verdict: Verdict = Verdict.PASS) -> DeviceReport:
    """As a run on WebGPU would leave it."""
    return DeviceReport(
        name="tiny",
        digest=runnable_digest(artifact),
        golden=sha256_of(artifact / "golden.npz"),
        device="webgpu",
        provider="WebGpuExecutionProvider",
        hardware="Iris | Xe",
        driver="Mesa 25.0",
        verdict=verdict,  # type: ignore[arg-type]
        claim="proven: run on this device",
        checks=(CheckResult(name="drift", verdict=verdict),),
        limits=open_artifact(artifact).manifest.plan.limits,
        finished="2026-11-29T12:00:00+00:00",
    )


@pytest.fixture
def artifact(tiny_build: Path, tmp_path: Path) -> Path:
    """A copy of the tiny artifact that has kept answers: what they are is no matter here."""
    folder = Path(shutil.copytree(tiny_build, tmp_path / "artifacts/cpu-int4"))
    (folder / "golden.npz").write_bytes(b"answers")
    files = {"golden.npz": sha256_of(folder / "golden.npz")}
    edit_json(folder / MANIFEST, lambda data: data["files"].update(files))
    return folder


def packaged(artifact: Path, tmp_path: Path) -> Path:
    job = PackageJob(artifact=open_artifact(artifact), folder=tmp_path / "packages", allow_unverified=True)
    return build_package(job).path


@pytest.mark.slow
def test_a_record_of_this_artifact_goes_along_and_stands_in_the_card(artifact: Path, tmp_path: Path) -> None:
    report(artifact).save(artifact.with_name("cpu-int4.webgpu.json"))
    package = packaged(artifact, tmp_path)
    assert DeviceReport.model_validate_json((package / RECORD).read_bytes()).hardware == "Iris | Xe"
    assert "| run on webgpu | Iris \\| Xe (WebGpuExecutionProvider, driver Mesa 25.0): PASS" in (
        package / "README.md"
    ).read_text(encoding="utf-8")
    assert RECORD in verify_package(package).record.measured


BROKEN: dict[str, Callable[[Path, Path], object]] = {
    "other bytes": lambda file, _: edit_json(file, lambda data: data.update(digest=digest_of("x"))),
    "other answers": lambda file, _: edit_json(file, lambda data: data.update(golden=digest_of("x"))),
    "the verdict is FAIL": lambda file, artifact: report(artifact, Verdict.FAIL).save(file),
    "its checks do not": lambda file, _: edit_json(file, lambda data: data["checks"][0].update(verdict="FAIL")),
    "of the device cuda": lambda file, _: edit_json(file, lambda data: data.update(device="cuda")),
    "damaged": lambda file, _: file.write_text(json.dumps({"name": "tiny"})),
}


@pytest.mark.parametrize("told", BROKEN)
def test_another_record_stays_out_and_is_found_inside(artifact: Path, tmp_path: Path, told: str) -> None:
    from qwen_onnx.package.devices_proven import copy_device_records

    beside, inside = artifact.with_name("cpu-int4.webgpu.json"), tmp_path / "package"
    report(artifact).save(beside)
    BROKEN[told](beside, artifact)
    inside.mkdir()
    copy_device_records(artifact, inside)
    assert not list(inside.iterdir())
    shutil.copyfile(beside, artifact / RECORD)
    faults: Any = list(record_faults(artifact))
    assert any(told in fault for fault in faults), faults


@pytest.mark.slow
def test_a_package_with_a_foreign_record_is_unsound(artifact: Path, tmp_path: Path) -> None:
    report(artifact).save(artifact.with_name("cpu-int4.webgpu.json"))
    package = packaged(artifact, tmp_path)
    edit_json(package / RECORD, lambda data: data.update(hardware="H200"))
    with pytest.raises(PackageError, match=RECORD):
        verify_package(package)
