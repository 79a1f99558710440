"""The workflows of GitHub Actions: sound, with few rights, and doing what a shell does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / ".github/workflows"
WORKFLOWS = sorted(FOLDER.glob("*.y*ml"))


def steps(path: Path) -> list[dict[str, str]]:
    jobs = yaml.safe_load(path.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.fixture
def actionlint() -> str:
    """It lies beside the Python that runs the tests, whose folder need not be on PATH."""
    found = shutil.which("actionlint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip("actionlint is not installed; the extra `dev` brings it on Linux")
    return found


def test_actionlint_finds_nothing(actionlint: str) -> None:
    done = subprocess.run([actionlint, *WORKFLOWS], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert {path.name for path in WORKFLOWS} == {"ci.yml", "nightly.yml", "release.yml"}


def test_actionlint_finds_a_fault_when_there_is_one(actionlint: str, tmp_path: Path) -> None:
    broken = tmp_path / "release.yml"
    broken.write_text((FOLDER / "release.yml").read_text().replace("runs-on:", "runs-at:"))
    done = subprocess.run([actionlint, broken], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "runs-at" in done.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_rights_are_few_and_actions_pinned(path: Path) -> None:
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    used = [step["uses"] for step in steps(path) if "uses" in step]
    assert used
    assert all(re.fullmatch(r"actions/[a-z-]+(/[a-z]+)?@[0-9a-f]{40}", name) for name in used), used


def test_they_run_the_commands_of_a_shell() -> None:
    ran = {path.name: [step["run"] for step in steps(path) if "run" in step] for path in WORKFLOWS}
    assert ran == {
        "ci.yml": ["bash .ci/run"],
        "nightly.yml": ["bash .ci/tools", "make test-release"],
        "release.yml": ["make release"],
    }
    made = subprocess.run(
        ["make", "-n", "--no-print-directory", "release"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert made.stdout.splitlines()[-1].split() == [".venv/bin/qwen-onnx", "release"]
