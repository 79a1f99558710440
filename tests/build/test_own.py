"""A fine-tune that no recipe describes, from its folder to a package: built, judged, and honest about both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qwen_onnx.artifact.manifest import open_artifact
from qwen_onnx.catalog.plan import UNCATALOGUED
from qwen_onnx.catalog.sources import FolderSource
from qwen_onnx.verify.report import load_report
from tests.conftest import make_tiny_checkpoint, rewrite_json, run_cli
from tests.fixtures.architectures import make_checkpoint


@pytest.mark.release
def test_a_finetune_is_built_judged_and_packaged(repository: Path, tmp_path: Path) -> None:
    for name in ("recipes", "pipelines"):
        shutil.copytree(repository / name, tmp_path / name)
    folder = make_checkpoint("Qwen3ForCausalLM", tmp_path / "My-Finetune")
    weights = load_file(folder / "model.safetensors")
    # random weights have no answer that rounding would leave in place, once they are as sure of it as a real model
    weights["model.norm.weight"] *= 16
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # Foundry Local reserves 2,048 tokens for an answer
    rewrite_json(folder / "config.json", max_position_embeddings=8192)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Mine\n")
    done = run_cli("optimize", "./My-Finetune", cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    assert "the verdict is FAIL" in done.stderr
    assert not (tmp_path / "artifacts/my-finetune/cpu-int4").exists()
    artifact = open_artifact(tmp_path / "artifacts/my-finetune/cpu-int4.rejected")
    plan = artifact.manifest.plan
    assert plan.sources == (FolderSource(kind="folder", name="My-Finetune"),)
    assert (plan.catalogued, plan.license) == (False, "Apache-2.0")
    assert artifact.manifest.source.origin == "folder My-Finetune"
    report = load_report(artifact.path)
    assert {item.name: item.verdict for item in report.checks}["drift"] == "FAIL"
    assert report.claim == artifact.manifest.claim
    assert UNCATALOGUED in report.claim
    assert UNCATALOGUED in (artifact.path / "report.html").read_text()

    refused = run_cli("package", artifact.path, cwd=tmp_path)
    assert refused.returncode == 10
    assert "only PASS is packaged" in refused.stderr
    packaged = run_cli("package", artifact.path, "--allow-unverified", cwd=tmp_path)
    assert packaged.returncode == 0, packaged.stderr
    package = Path(json.loads(packaged.stdout.splitlines()[-1])["path"])
    assert package.name == "my-finetune-int4-generic-cpu-1"
    card = (package / "README.md").read_text()
    assert "not in the catalogue" in card
    assert "license: apache-2.0" in card
    assert UNCATALOGUED in " ".join(run_cli("verify-package", package).stdout.split())


@pytest.mark.release
def test_two_folders_of_one_name_never_replace_each_other(repository: Path, tmp_path: Path) -> None:
    for name in ("recipes", "pipelines"):
        (tmp_path / name).symlink_to(repository / name)
    for seed, name in enumerate(("a", "b")):
        make_tiny_checkpoint(tmp_path / name / "ft", seed=seed)

    def built(model: str, *more: str, code: int = 0) -> str:
        done = run_cli("optimize", model, "--no-verify", "--precision", "fp32", *more, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        return done.stderr

    place = tmp_path / "artifacts/ft/cpu-fp32"
    assert "published artifacts/ft/cpu-fp32" in built("./a/ft")
    first = open_artifact(place).manifest
    assert str(tmp_path) not in (place / "manifest.json").read_text(), "no path of this machine"
    assert "already built" in built("./a/ft")
    refused = built("./b/ft", code=6)
    assert f"{tmp_path}/a/ft; now asked for: {tmp_path}/b/ft" in refused
    assert open_artifact(place).manifest == first
    make_tiny_checkpoint(tmp_path / "a/ft", seed=2)
    assert "published" in built("./a/ft"), "the folder's own artifact follows it"
    assert "published" in built("./b/ft", "--force")
    assert "a/ft" in built("./a/ft", code=6)
