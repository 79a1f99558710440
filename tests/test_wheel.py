"""The wheel carries recipes and pipelines: no checkout is needed. `make try-wheel` builds the starter with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
DATA = ("recipes", "pipelines")


@pytest.fixture(scope="module")
def unpacked(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel of this checkout installs; built through the source distribution, as pip would."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=repository, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (repository / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source / "dist")]
    subprocess.run(command, cwd=source, capture_output=True, check=True)
    folder = tmp_path_factory.mktemp("installed")
    (wheel,) = (source / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(unpacked: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-m", "qwen_onnx.cli.app", *arguments]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)


def test_it_holds_every_recipe_and_pipeline(unpacked: Path, repository: Path) -> None:
    for name in DATA:
        originals = {path.relative_to(repository): path for path in (repository / name).rglob("*") if path.is_file()}
        assert len(originals) > 10
        for relative, original in originals.items():
            assert (unpacked / "qwen_onnx/data" / relative).read_bytes() == original.read_bytes()


def test_what_a_file_of_the_package_reads_is_inside(unpacked: Path, repository: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "qwen_onnx"], cwd=repository, capture_output=True, text=True, check=True
    )
    assert [name for name in listed.stdout.splitlines() if not (unpacked / name).exists()] == []


def test_away_from_a_checkout_it_plans_the_same_and_works_in_the_folder_one_is_in(
    unpacked: Path, repository: Path, tmp_path: Path
) -> None:
    here, there = (
        run(unpacked, repository, "plan", "starter", "--full"),
        run(unpacked, tmp_path, "plan", "starter", "--full"),
    )
    assert there.returncode == 0, there.stderr
    assert there.stdout == here.stdout
    refused = run(unpacked, tmp_path, "optimize", "starter", "--source", "nothing")
    assert refused.returncode == 4, refused.stderr
    assert not list(unpacked.rglob("artifacts"))


def test_recipes_of_the_working_directory_add_to_those_inside(unpacked: Path, repository: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    text = (repository / "recipes/starter.yaml").read_text()
    own = tmp_path / "recipes/mine.yaml"
    own.write_text(text.replace("family: starter", "family: mine").replace("id: starter", "id: mine"))
    plan = run(unpacked, tmp_path, "plan", "mine", "--full")
    assert json.loads(plan.stdout)["catalogued"] is False, plan.stderr
    assert run(unpacked, tmp_path, "plan", "starter").returncode == 0
    own.write_text(text)
    clash = run(unpacked, tmp_path, "plan", "starter")
    assert clash.returncode == 2
    assert "recipes/mine.yaml: sizes.starter: id already used in recipes/starter.yaml" in clash.stderr
