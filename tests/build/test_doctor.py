"""What the doctor finds; versions are made up where the real ones agree."""

from __future__ import annotations

import json
from pathlib import Path

from qwen_onnx.build.doctor import GENAI, ORT, SDK, foundry_beside, foundry_skew
from qwen_onnx.catalog.load import load_catalog
from tests.conftest import edit_yaml, run_cli

PINS = ("foundry-local-sdk==2.2.1", "onnxruntime==1.31.0", "onnxruntime-genai-core==0.18.0", "numpy==2.4.6")
OURS = {GENAI: "0.18.0", ORT: "1.32.0"}


def test_versions_that_fit_say_so_and_need_no_remedy() -> None:
    findings = foundry_skew(PINS, OURS, ["numpy>=1", "onnxruntime>=1.31.0"])
    assert [finding.name for finding in findings] == [f"Foundry Local: {GENAI}", f"Foundry Local: {ORT}"]
    assert all(finding.ok and not finding.fix for finding in findings)
    assert "theirs 1.31.0, ours 1.32.0" in findings[1].found


def test_an_older_genai_of_theirs_is_explained() -> None:
    genai, _ = foundry_skew(PINS, OURS | {GENAI: "0.19.1"}, [])
    assert not genai.ok
    assert "theirs 0.18.0, ours 0.19.1" in genai.found
    assert "genai_config.json" in genai.found
    assert "foundry.yaml" in genai.fix
    assert "--profile cli1" in genai.fix


def test_a_newer_genai_of_theirs_is_no_fault() -> None:
    assert foundry_skew(PINS, OURS | {GENAI: "0.17.3"}, [])[0].ok


def test_an_onnxruntime_below_what_our_genai_needs_is_explained() -> None:
    _, ort = foundry_skew(PINS, OURS, ["onnxruntime>=1.32.0"])
    assert not ort.ok
    assert "need >=1.32.0" in ort.found
    assert "operators" in ort.found
    assert "foundry.yaml" in ort.fix


def test_the_sdk_beside_ours_is_found_with_what_it_needs_instead() -> None:
    needs = ["onnxruntime==1.31.0", "onnxruntime-genai-core==0.18.0", 'onnxruntime>=9; extra == "other"']
    (found,) = foundry_beside({SDK: "2.2.1", **OURS}, needs)
    assert not found.ok
    assert "onnxruntime 1.32.0 where it needs ==1.31.0" in found.found
    assert ">=9" not in found.found
    assert "pip uninstall foundry-local-sdk" in found.fix
    (kept,) = foundry_beside({SDK: "2.2.1", **OURS, ORT: "1.31.0"}, needs)
    assert kept.ok
    assert not foundry_beside(OURS, needs)


def test_the_environment_that_is_committed_has_the_pins(repository: Path) -> None:
    pins = load_catalog(repository).environments["foundry"].requirements
    assert [finding.ok for finding in foundry_skew(pins, OURS, ["onnxruntime>=1.31.0"])] == [True, True]


def test_an_environment_without_the_pins_is_an_error(checkout: Path) -> None:
    path = checkout / "pipelines/environments/foundry.yaml"
    edit_yaml(path, lambda environment: environment.update(requirements=["onnxruntime==1.31.0"]))
    done = run_cli("doctor", "starter", cwd=checkout)
    assert done.returncode == 2
    assert "no pin of onnxruntime-genai" in done.stderr


def test_the_verb_shows_a_skew_and_fails(checkout: Path) -> None:
    def age(environment: dict) -> None:  # type: ignore[type-arg]
        environment["requirements"] = ["onnxruntime==1.20.0", "onnxruntime-genai-core==0.14.1"]

    edit_yaml(checkout / "pipelines/environments/foundry.yaml", age)
    done = run_cli("doctor", "starter", cwd=checkout)
    said = " ".join(done.stdout.replace("│", " ").split())
    assert done.returncode == 3
    assert "theirs 0.14.1" in said
    assert "theirs 1.20.0" in said


def test_the_devices_of_this_machine_are_listed() -> None:
    done = run_cli("doctor", "--json")
    found = {each["name"]: each for each in json.loads(done.stdout)["findings"]}
    assert "CPUExecutionProvider" in found["device cpu"]["found"]
    assert "device npu" not in found
