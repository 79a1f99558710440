"""Every command and program of the README and of the guides works, on the artifact that they tell users to build."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PAGES = ("README.md", *(f"docs/{name}.md" for name in ("models", "targets", "use", "verification")))
TEXT = "\n".join((REPOSITORY / page).read_text(encoding="utf-8") for page in PAGES)
# these are the script of CI itself; a test that ran them would run itself
IN_CI = (
    "make optimize TARGET=cpu",
    "make package TARGET=cpu",
    "make foundry-check",
    "make release",
    "make lint",
    "make test",
    "make environments",
    "make test-slow",
)
# `make test-release` does these, every night
NIGHTLY = ("make release", "make try-wheel")
SLOW_OR_LASTING = {
    ".venv/bin/qwen-onnx serve artifacts/starter/cpu-int4": "the server fixture runs it",
    "make verify": "the next command does the same",
    ".venv/bin/qwen-onnx verify artifacts/starter/cpu-int4 --tasks hellaswag,truthfulqa_mc1,gsm8k --items 50 "
    "--recovery 0.95": "tests/verify/tasks/test_tasks.py, on tiny models",
    ".venv/bin/qwen-onnx verify artifacts/starter/cpu-int4": "test_starter.py, on a copy",
    ".venv/bin/qwen-onnx verify artifacts/starter/cpu-int4 --depth release": "test_optimize.py, on a tiny model",
    ".venv/bin/qwen-onnx verify artifacts/starter/cpu-int4 --device cpu": "test_device.py, with the runtime alone",
    ".venv/bin/qwen-onnx optimize starter --source dithered --output dithered-int4": "test_starter.py",
    "make optimize PRECISION=int6": "test_fisher_gptq.py, on a tiny model",
    ".venv/bin/qwen-onnx chat artifacts/starter/cpu-int6": "the artifact of the line above",
    ".venv/bin/qwen-onnx compare starter": "test_starter.py, one variant",
    ".venv/bin/qwen-onnx fetch starter --dither 0 --output dithered": "test_starter.py",
}


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str = TEXT) -> list[str]:
    return [line for block in blocks("sh", text) for line in block.splitlines()]


def as_installed(command: str) -> str:
    """The environment that runs the tests stands for ``.venv``."""
    return command.replace(".venv/bin/", f"{Path(sys.executable).parent}/")


def test_ci_runs_the_main_commands() -> None:
    script = (REPOSITORY / ".ci/run").read_text(encoding="utf-8")
    others = ("CONTRIBUTING.md", "docs/foundry.md", "docs/release.md")
    told = {*commands(), *(line for page in others for line in commands((REPOSITORY / page).read_text("utf-8")))}
    for command in IN_CI:
        assert command in told
        assert re.search(rf"^{re.escape(command)}\b", script, flags=re.MULTILINE)


def test_what_ci_leaves_out_is_done_every_night() -> None:
    ways = ["make", "--dry-run", "--no-print-directory"]
    done = subprocess.run([*ways, "test-release"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for command in NIGHTLY:
        target = command.split()[1]
        alone = subprocess.run([*ways, target], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert alone.stdout.splitlines()[-1] in done.stdout
    assert "slow or release" in done.stdout


def test_every_command_is_accounted_for() -> None:
    assert set(SLOW_OR_LASTING) <= set(commands())
    assert len(commands()) > 10


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if c not in {*IN_CI, *NIGHTLY, *SLOW_OR_LASTING}])
def test_a_command_of_the_readme(command: str, artifact_dir: Path) -> None:
    done = subprocess.run(
        as_installed(command),
        cwd=REPOSITORY,
        shell=True,
        input="What is the capital of France?\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if "generate" in command or "chat" in command:
        assert "Paris" in done.stdout


@pytest.fixture(scope="module")
def server(artifact_dir: Path) -> Iterator[None]:
    """The README's own command, with the README's own port."""
    command = as_installed(next(line for line in commands() if " serve " in line))
    child = subprocess.Popen(command.split(), cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen("http://127.0.0.1:8000/v1/models", timeout=1).read()
                break
            except (urllib.error.URLError, ConnectionError):
                assert child.poll() is None, "the server ended early: is port 8000 taken?"
                time.sleep(0.1)
        yield
    finally:
        child.terminate()
        child.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize("program", blocks("python"))
def test_a_program_of_the_readme(program: str, server: None) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
