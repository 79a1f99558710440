"""The program of docs/foundry.md, in Foundry Local's environment, on the package that the page makes."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, run_cli
from tests.package.test_foundry_check import environment

TEXT = (REPOSITORY / "docs/foundry.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_program_registers_a_package_and_finds_it_again(artifact_dir: Path, tmp_path: Path) -> None:
    made = run_cli("package", artifact_dir, "--output", tmp_path)
    package = json.loads(made.stdout.splitlines()[-1])["path"]
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    interpreter = environment("foundry")
    variables = {**interpreter.variables, "HOME": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run(
            [str(interpreter.python), "-c", program, package],
            env=variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Paris" in done.stdout
    assert list(tmp_path.glob(".my-app*")), "the registration went elsewhere than into this HOME"
