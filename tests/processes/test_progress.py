"""Progress is heard by those who listen, and by nobody else."""

from __future__ import annotations

import pytest

from qwen_onnx.processes.progress import LOGGER, listening, progress
from tests.conftest import run_cli


def test_only_a_listener_hears_it(capfd: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []
    before = (LOGGER.level, LOGGER.propagate, list(LOGGER.handlers))
    with listening(heard.append):
        progress("100 % of %s")
    progress("afterwards")
    assert heard == ["100 % of %s"]
    assert capfd.readouterr() == ("", "")
    assert (LOGGER.level, LOGGER.propagate, LOGGER.handlers) == before


def test_the_command_line_says_it_beside_the_result() -> None:
    done = run_cli("plan", "starter")
    assert done.stdout.startswith("{")
    assert done.stderr.startswith("› starter/cpu-int4: verification level")
