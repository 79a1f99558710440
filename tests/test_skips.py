"""No test is left out: a skip in CI is a failure, but for the few that are listed."""

from __future__ import annotations

import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.fixtures.skips import ALLOWED

SKIPS = """
import pytest
@pytest.mark.skipif(True, reason={reason!r})
def test_marked():
    pass
def test_told():
    pytest.skip({reason!r})
@pytest.mark.xfail(reason="known")
def test_expected():
    assert False
"""


def outcome(folder: Path, text: str, ci: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(text)
    environment = {**os.environ, "CI": ci, "PYTHONPATH": str(REPOSITORY), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.fixtures.skips",
        "-p",
        "no:cacheprovider",
        str(folder),
    ]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("ci", "reason", "said"),
    [
        ("true", "no browser", "1 failed, 1 xfailed, 1 error"),
        ("true", next(iter(ALLOWED)), "2 skipped, 1 xfailed"),
        ("", "no browser", "2 skipped, 1 xfailed"),
    ],
)
def test_what_is_skipped(tmp_path: Path, ci: str, reason: str, said: str) -> None:
    done = outcome(tmp_path, SKIPS.format(reason=reason), ci)
    assert said in done.stdout, done.stdout + done.stderr
    fails = said.startswith("1 failed")
    assert done.returncode == fails
    assert ("tests/fixtures/skips.py" in done.stdout) == fails


def test_a_whole_file_that_is_skipped_fails_too(tmp_path: Path) -> None:
    done = outcome(tmp_path, "import pytest\npytest.importorskip('no_such_module')\n", "true")
    assert done.returncode != 0
    assert "no_such_module" in done.stdout


def test_every_folder_of_tests_is_looked_into(pytestconfig: pytest.Config) -> None:
    tests = REPOSITORY / "tests"
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")}
    assert len(folders) > 15
    passed_over = pytestconfig.getini("norecursedirs")
    lost = [folder for folder in folders for part in folder.parts if any(fnmatch(part, name) for name in passed_over)]
    assert lost == []
