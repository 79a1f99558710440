"""The drift of an artifact with an adapter against PyTorch with the adapter merged, and the gate that it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from qwen_onnx.artifact.adapter_file import AdapterRecord, write_adapter_file
from qwen_onnx.artifact.manifest import open_runnable
from qwen_onnx.errors import ArtifactError
from qwen_onnx.records import Verdict
from qwen_onnx.runtime import QwenService
from qwen_onnx.sources.adapter import open_adapter
from qwen_onnx.sources.merge import write_merged
from qwen_onnx.verify.adapters import verify_adapter
from qwen_onnx.verify.records import VerifyOptions
from tests.fixtures.adapters import make_adapter, with_slots
from tests.fixtures.tools import run_cli

OPTIONS = VerifyOptions(threads=1, window=64, windows_per_domain=1, resamples=100)


@pytest.fixture(scope="module")
def merged(adapters: dict[str, Path], tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with `all` merged."""
    folder = tmp_path_factory.mktemp("merged") / "checkpoint"
    folder.mkdir()
    write_merged(tiny_checkpoint, open_adapter(adapters["all"].with_suffix("")), folder)
    return folder


def measured(file: Path, artifact: Path, merged: Path) -> AdapterRecord:
    return verify_adapter(file, open_runnable(artifact), merged, OPTIONS)


def test_in_fp32_nothing_drifts(
    slotted_artifact: Path, adapters: dict[str, Path], merged: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copy(adapters["all"], tmp_path))
    record = measured(file, slotted_artifact, merged)
    assert record.drift
    assert (record.drift.verdict, record.drift.precision, record.drift.top1) == (Verdict.PASS, "fp32", 1)
    assert record.drift.kld_upper < 1e-7
    assert record.drift.positions == 8 * (OPTIONS.window - 1)
    # what the file holds besides is as it was, and it is served
    assert record.model_copy(update={"drift": None, "content": None}) == measured_before(adapters["all"])
    with QwenService(slotted_artifact, threads=1, context=256, adapters={"all": file}) as service:
        assert [adapter.drift for adapter in service.engine.adapters] == ["PASS"]


def measured_before(file: Path) -> AdapterRecord:
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    record = AdapterRecord.model_validate_json(header["__metadata__"]["qwen_onnx.adapter"])
    return record.model_copy(update={"content": None})


def test_in_int4_the_rounding_is_measured(
    tiny_artifact: Path, tiny_checkpoint: Path, adapters: dict[str, Path], merged: Path, tmp_path: Path
) -> None:
    artifact = with_slots(tiny_artifact, tiny_checkpoint, tmp_path / "int4", precision="int4")
    record = measured(Path(shutil.copy(adapters["all"], tmp_path)), artifact, merged)
    assert record.drift
    assert record.drift.precision == "int4"
    assert 1e-6 < record.drift.kld_mean <= record.drift.kld_upper
    assert record.drift.verdict == Verdict.PASS


@pytest.mark.slow
def test_an_adapter_of_the_artifact_is_compared_to_pytorch_with_the_weights_of_the_artifact(
    tiny_artifact: Path, tiny_checkpoint: Path, adapters: dict[str, Path], merged: Path, tmp_path: Path
) -> None:
    artifact = with_slots(tiny_artifact, tiny_checkpoint, tmp_path / "int4", precision="int4")
    learnt, found = open_adapter(adapters["all"].with_suffix("")), []
    for checkpoint, given in ((merged, None), (tiny_checkpoint, learnt)):
        file = Path(shutil.copy(adapters["all"], tmp_path / "file"))
        record = verify_adapter(file, open_runnable(artifact), checkpoint, OPTIONS, learnt=given)
        assert record.drift
        found.append(record.drift.kld_mean)
    # the rounding of activations is left
    assert 0 < found[1] < found[0] / 4


def test_an_adapter_that_drifts_is_not_served(
    slotted_artifact: Path, adapters: dict[str, Path], merged: Path, tmp_path: Path
) -> None:
    record = measured_before(adapters["all"]).model_dump(mode="json", exclude={"content"})
    file = tmp_path / "wrong.safetensors"
    write_adapter_file(file, {name: -values for name, values in load_file(adapters["all"]).items()}, **record)
    # A and B with the other sign are the same product
    verdicts = [measured(file, slotted_artifact, merged).drift.verdict]  # type: ignore[union-attr]
    scaled = {name: values * (3 if "lora_B" in name else 1) for name, values in load_file(adapters["all"]).items()}
    write_adapter_file(file, scaled, **record)
    verdicts.append(measured(file, slotted_artifact, merged).drift.verdict)  # type: ignore[union-attr]
    assert verdicts == [Verdict.PASS, Verdict.FAIL]
    with pytest.raises(ArtifactError, match="drift too far: FAIL") as caught:
        QwenService(slotted_artifact, threads=1, context=256, adapters={"wrong": file})
    assert "adapter convert" in str(caught.value)


@pytest.mark.slow
def test_the_verdict_on_the_command_line(
    slotted_artifact: Path, adapters: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copy(adapters["all"], tmp_path))
    command = ("adapter", "verify", file, "--base", slotted_artifact, "--source", tiny_checkpoint)
    other = run_cli(*command, "--adapter", make_adapter(tmp_path / "other", seed=9))
    assert other.returncode == 6
    assert "was made of another adapter" in other.stderr
    done = run_cli(*command, "--adapter", adapters["all"].with_suffix(""))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["drift"]["verdict"], told["name"]) == ("PASS", "all")
    scaled = {name: values * (3 if "lora_B" in name else 1) for name, values in load_file(file).items()}
    record = measured_before(file).model_dump(mode="json", exclude={"content", "drift"})
    write_adapter_file(file, scaled, **record)
    failed = run_cli(*command, "--adapter", adapters["all"].with_suffix(""))
    assert failed.returncode == 7, failed.stderr
    assert json.loads(failed.stdout.splitlines()[-1])["drift"]["verdict"] == "FAIL"
