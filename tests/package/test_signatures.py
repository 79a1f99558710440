"""Signed records of devices: by whom, of which bytes, and what does not count."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_onnx.artifact.checksums import write_sums
from qwen_onnx.errors import ConfigError, EnvironmentFault, PackageError
from qwen_onnx.package import signatures
from qwen_onnx.package.devices_proven import copy_device_records, record_faults
from qwen_onnx.records import Verdict
from tests.conftest import run_cli
from tests.package.conftest import edit_json
from tests.package.test_devices_proven import RECORD, artifact, packaged, report

__all__ = ["artifact"]

SIGNED = f"{RECORD}.sig"


def new_key(folder: Path, name: str) -> Path:
    file = folder / name
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", file], check=True)
    return file


def allowing(file: Path, **keys: Path) -> Path:
    lines = [f"{name}@example.com {key.with_suffix('.pub').read_text().strip()}\n" for name, key in keys.items()]
    file.write_text("".join(lines))
    return file


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    folder = tmp_path / "keys"
    folder.mkdir()
    return new_key(folder, "alice"), new_key(folder, "mallory")


def signed(artifact: Path, key: Path) -> Path:
    """A record beside the artifact, signed."""
    record = report(artifact).save(artifact.with_name("cpu-int4.webgpu.json"))
    signatures.sign(record, key)
    return record


def test_a_signed_record_goes_along_and_names_its_signer(
    artifact: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    alice, mallory = keys
    beside = signed(artifact, alice)
    allowed = allowing(tmp_path / "allowed", mallory=mallory, alice=alice)
    assert signatures.signers(artifact, allowed) == {beside.name: "alice@example.com"}
    package = tmp_path / "package"
    package.mkdir()
    copy_device_records(artifact, package)
    assert sorted(path.name for path in package.iterdir()) == [RECORD, SIGNED]
    write_sums(package)
    assert signatures.signers(package, allowed) == {RECORD: "alice@example.com"}
    # signed anew, not asked whether to overwrite
    signatures.sign(beside, mallory)
    assert signatures.signers(artifact, allowed) == {beside.name: "mallory@example.com"}


@pytest.mark.slow
def test_the_command_asks_for_signers(artifact: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    signed(artifact, keys[0])
    package = packaged(artifact, tmp_path)
    asked = ("verify-package", package, "--allowed-signers")
    done = run_cli(*asked, allowing(tmp_path / "allowed", alice=keys[0]))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["signers"] == {RECORD: "alice@example.com"}
    refused = run_cli(*asked, allowing(tmp_path / "others", mallory=keys[1]))
    assert refused.returncode == PackageError.exit_code
    assert "signed by nobody whom others names" in refused.stderr


def by_another(record: Path, key: Path) -> None:
    signatures.sign(record, key.with_name("mallory"))


def for_another_purpose(record: Path, key: Path) -> None:
    done = subprocess.run(
        ["ssh-keygen", "-q", "-Y", "sign", "-n", "git", "-f", key],
        input=record.read_bytes(),
        capture_output=True,
        check=True,
    )
    signatures.signature_of(record).write_bytes(done.stdout)


def failed(record: Path, key: Path) -> None:
    edit_json(record, lambda data: data.update(verdict=Verdict.FAIL))
    signatures.sign(record, key)


BROKEN: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "altered": (lambda record, _: edit_json(record, lambda data: data.update(hardware="H200")), "it was altered"),
    "by another": (by_another, "signed by nobody whom allowed names"),
    "for another purpose": (for_another_purpose, "or signed as something else"),
    "unsigned": (lambda record, _: signatures.signature_of(record).unlink(), "it is not signed"),
    "garbage": (lambda record, _: signatures.signature_of(record).write_bytes(b"x" * 99), "signed by nobody"),
    "endless": (lambda record, _: signatures.signature_of(record).write_bytes(b"x" * 99_999), "more than 65,536"),
    "damaged": (lambda record, _: record.write_text("{}"), "Field required"),
    "failed": (failed, "the verdict is FAIL"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_does_not_count(artifact: Path, keys: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    breaks, said = BROKEN[kind]
    signed(artifact, keys[0])
    inside = artifact / RECORD
    for name in ("", ".sig"):
        shutil.move(artifact.with_name(f"cpu-int4.webgpu.json{name}"), f"{inside}{name}")
    breaks(inside, keys[0])
    with pytest.raises(PackageError, match=said):
        signatures.signers(artifact, allowing(tmp_path / "allowed", alice=keys[0]))


def test_a_record_of_other_bytes_is_none_of_this_package(
    artifact: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    signed(artifact, keys[0])
    (artifact / "manifest.json").write_text("{}")
    with pytest.raises(PackageError, match="no run on a device is recorded"):
        signatures.signers(artifact, allowing(tmp_path / "allowed", alice=keys[0]))


def test_a_signature_of_nothing_is_a_fault(artifact: Path) -> None:
    (artifact / SIGNED).write_text("-----BEGIN SSH SIGNATURE-----")
    assert list(record_faults(artifact)) == [f"{SIGNED}: what it signs is not there"]


def test_keys_and_programs_that_are_not_there(
    artifact: Path, keys: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = signed(artifact, keys[0])
    with pytest.raises(ConfigError, match="no such file"):
        signatures.require_signing(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no such file"):
        signatures.signers(artifact, tmp_path / "nothing")
    (tmp_path / "no-key").write_text("no key")
    with pytest.raises(ConfigError, match="no-key"):
        signatures.sign(record, tmp_path / "no-key")
    monkeypatch.setenv("PATH", str(tmp_path))
    for use in (lambda: signatures.require_signing(keys[0]), lambda: signatures.signers(artifact, keys[0])):
        with pytest.raises(EnvironmentFault, match="ssh-keygen is not installed"):
            use()
