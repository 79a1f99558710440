"""One flipped bit anywhere is found, and so is a statement that does not agree with another."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_onnx.artifact.checksums import package_digest, write_sums
from qwen_onnx.errors import PackageError
from qwen_onnx.files import sha256_of
from qwen_onnx.package.provenance import PROVENANCE
from qwen_onnx.package.verify import verify_package
from tests.conftest import rewrite_json, run_cli


def faults_of(folder: Path) -> str:
    with pytest.raises(PackageError) as raised:
        verify_package(folder)
    return str(raised.value)


def test_a_sound_package_passes_and_names_its_digest(tiny_package: Path) -> None:
    done = run_cli("verify-package", tiny_package)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said == {
        "id": "checkpoint-int4-generic-cpu:1",
        "verdict": "UNVERIFIED",
        "digest": sha256_of(tiny_package / "SHA256SUMS"),
    }
    assert verify_package(tiny_package).record.unverified


@pytest.mark.slow
def test_one_flipped_bit_in_any_file_is_found(broken: Path) -> None:
    dice = random.Random(0)
    names = sorted(path.name for path in broken.iterdir())
    assert len(names) > 10
    for name in names:
        path = broken / name
        whole = path.read_bytes()
        assert whole, name
        # both ends, and anywhere between
        for place in {0, len(whole) - 1, dice.randrange(len(whole)), dice.randrange(len(whole))}:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << dice.randrange(8)
            path.write_bytes(damaged)
            faults_of(broken)
        path.write_bytes(whole)
    verify_package(broken)


@pytest.mark.release
def test_every_byte_of_the_small_files_counts(broken: Path) -> None:
    """Those that hold statements: no byte of them is read in two ways."""
    for name in ("SHA256SUMS", "package.json"):
        path = broken / name
        whole = path.read_bytes()
        for place in range(0, len(whole), 7):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            faults_of(broken)
        path.write_bytes(whole)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "renamed": (
        lambda folder: (folder / "NOTICE").rename(folder / "NOTICES"),
        "NOTICE is missing",
    ),
    "hidden": (lambda folder: (folder / ".hidden").write_text("x"), ".hidden was added"),
    "empty file": (lambda folder: (folder / "empty").touch(), "empty was added"),
    "empty folder": (lambda folder: (folder / "empty").mkdir(), "empty/ was added"),
    "folder": (lambda folder: shutil.copytree(folder, folder / "in"), "in/ was added"),
    "symlink": (lambda folder: (folder / "link").symlink_to("LICENSE"), "link is not a plain file"),
    "symlink to a folder": (lambda folder: (folder / "link").symlink_to("."), "link is not a plain file"),
    "pipe": (lambda folder: os.mkfifo(folder / "pipe"), "pipe is not a plain file"),
    "truncated": (lambda folder: os.truncate(folder / "model.onnx.data", 1000), "model.onnx.data was altered"),
    "grown": (lambda folder: (folder / "LICENSE").open("a").write(" "), "LICENSE was altered"),
    "no list": (lambda folder: (folder / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
    "no record": (lambda folder: (folder / "package.json").unlink(), "not a package"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_was_removed_renamed_or_added_is_named(broken: Path, name: str) -> None:
    damage, word = DAMAGES[name]
    damage(broken)
    assert word in faults_of(broken)


@pytest.mark.slow
def test_all_faults_are_told_together(broken: Path) -> None:
    (broken / "tokenizer.json").unlink()
    (broken / "extra").write_text("x")
    (broken / "LICENSE").write_text("public domain")
    done = run_cli("verify-package", broken)
    assert done.returncode == 10, done.stdout
    for word in ("tokenizer.json is missing", "extra was added", "LICENSE was altered"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def rewritten(folder: Path, name: str, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    """Change a JSON file and list its new bytes, as someone who wants to hide it would."""
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data, indent=1))
    write_sums(folder)


def _byproduct(statement: dict, name: str) -> dict:  # type: ignore[type-arg]
    found = statement["predicate"]["runDetails"]["byproducts"]
    return next(item["annotations"] for item in found if item["name"] == name)


LIES: dict[str, tuple[str, Callable[[dict], object], str]] = {  # type: ignore[type-arg]
    "verdict": (
        "package.json",
        lambda record: record.update(verdict="PASS", unverified=False),
        "verdict: package.json says PASS, the manifest UNVERIFIED",
    ),
    "unverified": ("package.json", lambda record: record.update(unverified=False), "unverified = false"),
    "claim": ("package.json", lambda record: record.update(claim="proven"), "claim: package.json says proven"),
    "another plan": ("package.json", lambda record: record.update(plan_digest="0" * 64), "plan_digest: package.json"),
    "another target": ("package.json", lambda record: record.update(target="cuda"), "target: package.json says cuda"),
    "altered": ("package.json", lambda record: record.update(altered=["README.md"]), "no artifact has it"),
    "measured": ("package.json", lambda record: record["measured"].append("model.onnx"), "as measured"),
    "limits in the plan": (
        "manifest.json",
        lambda manifest: manifest["plan"]["limits"].update(kld_mean=9),
        "does not have the digest",
    ),
    "manifest proves": (
        "manifest.json",
        lambda manifest: manifest.update(verdict="PASS"),
        "claims more or less than PASS proves",
    ),
    "a subject": (
        PROVENANCE,
        lambda statement: statement["subject"].pop(),
        f"tokenizer_config.json is not in {PROVENANCE}",
    ),
    "statement's verdict": (
        PROVENANCE,
        lambda statement: _byproduct(statement, "verdict").update(verdict="PASS"),
        "different things of the verdict",
    ),
    "statement's model": (
        PROVENANCE,
        lambda statement: statement["predicate"]["buildDefinition"]["externalParameters"].update(model="other"),
        f"model: {PROVENANCE} says other",
    ),
    "unknown key": (PROVENANCE, lambda statement: statement["predicate"].update(signed=True), "signed"),
    "bill of materials": (
        "sbom.cdx.json",
        lambda bill: bill["metadata"]["component"]["components"].pop(),
        "is not in sbom.cdx.json",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_statement_that_contradicts_another_is_found(broken: Path, name: str) -> None:
    file, change, word = LIES[name]
    rewritten(broken, file, change)
    said = faults_of(broken)
    assert word in said, said


def test_weights_that_were_exchanged_with_their_checksum_are_found(broken: Path) -> None:
    (broken / "model.onnx.data").write_bytes(b"other weights")
    write_sums(broken)
    said = faults_of(broken)
    assert "model.onnx.data is not that of the manifest" in said
    assert f"model.onnx.data is not the one in {PROVENANCE}" in said
    assert "model.onnx.data is not the one in sbom.cdx.json" in said


def test_a_licence_must_travel(broken: Path) -> None:
    (broken / "LICENSE").unlink()
    write_sums(broken)
    assert "LICENSE is missing" in faults_of(broken)


@pytest.mark.slow
def test_a_digest_from_a_trusted_place_pins_every_byte(broken: Path) -> None:
    digest = package_digest(broken)
    verify_package(broken, digest)
    done = run_cli("verify-package", broken, "--expect", "0" * 64)
    assert done.returncode == 10
    assert digest in done.stderr


@pytest.mark.slow
def test_what_is_no_package_is_told(tmp_path: Path, tiny_build: Path) -> None:
    for folder, word in ((tmp_path / "none", "there is no package"), (tiny_build, "not a package")):
        done = run_cli("verify-package", folder)
        assert done.returncode == 10
        assert word in done.stderr


@pytest.mark.slow
def test_a_package_is_run_as_an_artifact_is(broken: Path) -> None:
    done = run_cli("generate", broken, "Hello", "--max-tokens", "2")
    assert done.returncode == 0, done.stderr
    rewrite_json(broken / "genai_config.json", model={})
    done = run_cli("generate", broken, "Hello", "--max-tokens", "2")
    assert done.returncode == 6
    assert "genai_config.json was altered" in done.stderr
