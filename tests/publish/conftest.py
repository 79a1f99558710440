"""Packages to publish, and places to publish them to."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from qwen_onnx.artifact.checksums import write_sums
from qwen_onnx.artifact.manifest import MANIFEST, open_artifact, read_manifest
from qwen_onnx.cli import app as cli
from qwen_onnx.files import file_checksums
from qwen_onnx.package.build import PackageJob, build_package
from qwen_onnx.records import Verdict
from qwen_onnx.verify.records import CheckResult, VerifyOptions
from qwen_onnx.verify.report import Report, environment
from tests.fixtures.fake_hubs import FakeHuggingFace, FakeModelScope
from tests.fixtures.fake_registry import TOKEN, FakeRegistry
from tests.fixtures.fake_server import running

LARGEST = "model.onnx.data"
# what two versions with the same weights do not share, in bytes
SMALL_FILES = 200_000


@pytest.fixture(scope="session")
def passing_artifact(tiny_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fixture and no proof: the tiny artifact with a report that claims PASS. test_honest.py has a real one."""
    folder = Path(shutil.copytree(tiny_build, tmp_path_factory.mktemp("passing") / "int4"))
    plan = read_manifest(folder).plan
    check = CheckResult(name="tokenizer", verdict=Verdict.PASS, detail="made up for a test")
    Report(
        verdict=Verdict.PASS,
        verification=plan.verification,
        claim=plan.claim("PASS"),
        checks=(check,),
        limits=plan.limits,
        options=VerifyOptions(),
        environment={**environment(), "seconds": 0.0},
    ).save(folder)
    return claim_pass(folder)


def claim_pass(artifact: Path) -> Path:
    """Write the manifest anew, over the files that are there."""
    manifest = read_manifest(artifact)
    files = file_checksums(artifact, without=MANIFEST)
    claim = manifest.plan.claim("PASS")
    manifest = manifest.model_copy(update={"verdict": Verdict.PASS, "claim": claim, "files": files})
    (artifact / MANIFEST).write_text(manifest.model_dump_json(indent=1))
    return artifact


@pytest.fixture(scope="session")
def passing_package(passing_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package that may be published. Tests that change it copy it."""
    return packaged(passing_artifact, tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="session")
def newer_package(passing_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another package with the same id: one small file more, the large ones the same."""
    artifact = Path(shutil.copytree(passing_artifact, tmp_path_factory.mktemp("newer") / "int4"))
    (artifact / "NEWS.txt").write_text("new")
    return packaged(claim_pass(artifact), tmp_path_factory.mktemp("newer-packages"))


def packaged(artifact: Path, folder: Path) -> Path:
    """``artifact``, packaged below ``folder``."""
    return build_package(PackageJob(open_artifact(artifact), folder)).path


@pytest.fixture
def package(passing_package: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(passing_package, tmp_path / "package"))


def rewrite(package: Path, **records: object) -> Path:
    """Change ``package.json`` and list the checksums anew, as a forger would."""
    path = package / "package.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | records))
    write_sums(package)
    return package


def files_of(folder: Path) -> dict[str, bytes]:
    """Name and bytes of every file."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def leftovers(folder: Path) -> list[str]:
    """What is in a folder besides packages and the locks beside them."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".") and not path.name.endswith(".lock")]


@pytest.fixture
def registry() -> Iterator[Any]:
    with running(FakeRegistry, blobs={}, manifests={}, uploads=set(), uploaded=[]) as fake:
        yield fake


@contextmanager
def hub_of(kind: type, monkeypatch: pytest.MonkeyPatch, endpoint: str, variable: str, address: str) -> Iterator[Any]:
    """A faked hub that the real client is led to by its own variables."""
    with running(kind, repositories={}, stored={}, private=set(), puts=[]) as hub:
        monkeypatch.setenv(endpoint, f"http://127.0.0.1:{hub.port}")
        monkeypatch.setenv(variable, hub.token)
        hub.address, hub.variable = address, variable
        yield hub


@pytest.fixture
def huggingface(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with hub_of(FakeHuggingFace, monkeypatch, "HF_ENDPOINT", "HF_TOKEN", "hf://org/tiny") as hub:
        yield hub


@pytest.fixture
def modelscope(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with hub_of(FakeModelScope, monkeypatch, "MODELSCOPE_ENDPOINT", "MODELSCOPE_API_TOKEN", "ms://org/tiny") as hub:
        yield hub


@pytest.fixture(params=["huggingface", "modelscope"])
def hub(request: pytest.FixtureRequest) -> Any:
    """Each hub in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def no_logins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine's own: no tokens, no docker configuration, no login that a hub's client saved."""
    registry = ("QWEN_ONNX_REGISTRY_USER", "QWEN_ONNX_REGISTRY_PASSWORD", "QWEN_ONNX_REGISTRY_HOST")
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN", *registry):
        monkeypatch.delenv(name, raising=False)
    for name in ("DOCKER_CONFIG", "HF_HOME", "MODELSCOPE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


SECRETS = ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "QWEN_ONNX_REGISTRY_PASSWORD")


def run(*arguments: object) -> tuple[int, str, str]:
    """The command line in this process: exit code, output and messages, in none of which a secret may stand."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["qwen-onnx", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    printed = out.getvalue() + err.getvalue()
    user = os.environ.get("QWEN_ONNX_REGISTRY_USER", "")
    for value in filter(None, (os.environ.get(name, "").strip() for name in SECRETS)):
        for form in (value, base64.b64encode(f"{user}:{value}".encode()).decode(), TOKEN):
            assert form not in printed, printed
    return code, out.getvalue(), err.getvalue()


def publish(*arguments: object) -> dict[str, Any]:
    """``qwen-onnx publish`` that works: its line of JSON."""
    return _last_line("publish", *arguments)


def pull(*arguments: object) -> dict[str, Any]:
    """``qwen-onnx pull`` that works: its line of JSON."""
    return _last_line("pull", *arguments)


def _last_line(*arguments: object) -> dict[str, Any]:
    code, out, err = run(*arguments)
    assert code == 0, err
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def refused(*arguments: object, code: int = 11) -> str:
    """The message of a command that must fail in this way, on one line."""
    found, out, err = run(*arguments)
    assert found == code, (found, out, err)
    return " ".join(err.split())
