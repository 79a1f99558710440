"""Packages of adapters: made, verified, published and pulled; what was changed or did not pass is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_onnx.artifact.adapter_file import AdapterDrift, check_adapter_file, write_adapter_file
from qwen_onnx.artifact.checksums import write_sums
from qwen_onnx.errors import ArtifactError, PackageError, PublishError
from qwen_onnx.package.adapters import package_adapter, verify_any
from qwen_onnx.publish.transfer import publish_package, pull_package
from tests.fixtures.tools import run_cli

SLOT = "model.layers.0.attn.o_proj.matmul"


def adapter_file(file: Path, verdict: str | None = "PASS") -> Path:
    """An adapter for one slot, with a verdict on its drift."""
    draw = np.random.default_rng(0).standard_normal
    tensors = {f"{SLOT}.lora_{part}.weight": draw(shape, np.float32) for part, shape in (("A", (8, 2)), ("B", (2, 8)))}
    figures = {"positions": 100, "kld_mean": 0.02, "kld_upper": 0.03, "kld_limit": 0.18, "top1": 0.9, "ppl_ratio": 1.0}
    about = {"graph": "b" * 64, "precision": "int4", "verdict": verdict}
    drift = AdapterDrift.model_validate({**about, **figures}) if verdict else None
    told = {
        "name": "faq",
        "base": {"model": "starter", "weights": "a" * 64},
        "rank": 2,
        "targets": ["o_proj"],
    }
    write_adapter_file(file, tensors, **told, verdict="PASS", adapter="c" * 64, drift=drift)
    return file


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return package_adapter(adapter_file(tmp_path / "faq.safetensors"), tmp_path / "packages").path


def test_an_adapter_is_packaged_published_and_pulled(tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "faq.safetensors")
    made = run_cli("adapter", "package", file, "--output", tmp_path / "packages")
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout.splitlines()[-1])
    assert (told["id"], told["verdict"]) == ("starter-faq:1", "PASS")
    folder = tmp_path / "packages/starter-faq-1"
    names = {path.name for path in folder.iterdir()}
    assert names == {"adapter.safetensors", "package.json", "README.md", "SHA256SUMS"}
    assert "mean KLD 0.02, at most 0.03" in (folder / "README.md").read_text()
    checked = run_cli("verify-package", folder, "--expect", told["digest"])
    assert checked.returncode == 0, checked.stderr
    for place, pulled in ((tmp_path / "shelf", "one"), (f"oci:{tmp_path / 'layout'}:v1", "two")):
        sent = run_cli("publish", folder, place)
        assert sent.returncode == 0, sent.stderr
        assert json.loads(sent.stdout.splitlines()[-1])["digest"] == told["digest"]
        got = run_cli("pull", place, "--output", tmp_path / pulled, "--expect", told["digest"])
        assert got.returncode == 0, got.stderr
        assert (tmp_path / pulled / "adapter.safetensors").read_bytes() == file.read_bytes()
    assert check_adapter_file(tmp_path / "two/adapter.safetensors").name == "faq"


@pytest.mark.parametrize("verdict", [None, "FAIL", "INCONCLUSIVE"])
def test_what_did_not_pass_is_not_packaged(tmp_path: Path, verdict: str | None) -> None:
    file = adapter_file(tmp_path / "faq.safetensors", verdict)
    with pytest.raises(PackageError, match=f"the verdict on its drift is {verdict or 'UNVERIFIED'}") as caught:
        package_adapter(file, tmp_path / "packages")
    assert "qwen-onnx adapter verify" in str(caught.value)
    assert not list((tmp_path / "packages").glob("[!.]*"))


def test_another_adapter_does_not_take_the_place(package: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    adapter_file(other)
    content = other.read_bytes().replace(b"c" * 64, b"d" * 64)
    other.write_bytes(content)
    with pytest.raises(PackageError, match="is there, of another adapter"):
        package_adapter(other, package.parent)
    assert package_adapter(other, package.parent, version=2).path.name == "starter-faq-2"


def rewritten(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        told = json.loads((folder / name).read_text())
        change(told)
        (folder / name).write_text(json.dumps(told))
        write_sums(folder)

    return edit


def flipped(folder: Path) -> None:
    content = bytearray((folder / "adapter.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "adapter.safetensors").write_bytes(content)
    write_sums(folder)


def failed(folder: Path) -> None:
    adapter_file(folder / "adapter.safetensors", "FAIL")
    write_sums(folder)


def noted(folder: Path) -> None:
    (folder / "README.md").write_text("proven by nobody\n")
    write_sums(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "README.md").write_text("x"), "README.md was altered"),
        (lambda folder: (folder / "run.py").write_text("x"), "run.py was added"),
        (lambda folder: (folder / "adapter.safetensors").unlink(), "adapter.safetensors is missing"),
        (flipped, "is truncated or altered"),
        (failed, "says other things than adapter.safetensors"),
        (noted, "README.md is not that of package.json"),
        (rewritten("package.json", lambda told: told.update(claim="proven")), "claim: package.json says other things"),
        (rewritten("package.json", lambda told: told.update(id="other:1")), "id: package.json says other things"),
        (rewritten("package.json", lambda told: told.update(path="/etc")), "path: Extra inputs are not permitted"),
        (rewritten("package.json", lambda told: told["adapter"].update(rank=1)), "adapter: package.json says other"),
        (rewritten("package.json", lambda told: told.pop("contents")), "package.json is damaged"),
    ],
)
def test_what_was_changed_is_found_and_leaves_by_no_way(
    package: Path, tmp_path: Path, change: Callable[[Path], object], words: str
) -> None:
    verify_any(package)
    change(package)
    with pytest.raises((PackageError, ArtifactError), match=words):
        verify_any(package)
    with pytest.raises((PackageError, PublishError)):
        publish_package(package, str(tmp_path / "shelf"), print)
    with pytest.raises((PackageError, PublishError)):
        pull_package(str(package), tmp_path, print, target=tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    assert not (tmp_path / "shelf").exists()


def test_hubs_take_no_adapters(package: Path) -> None:
    with pytest.raises(PublishError, match="do not go to hubs"):
        publish_package(package, "hf://me/faq", print)
