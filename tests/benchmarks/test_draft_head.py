"""The benchmark of heads for multi-token prediction: it builds, runs and tells; no figure is judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.draft_head import main

TINY = {
    "hidden": 64,
    "intermediate": 128,
    "layers": 4,
    "heads": 4,
    "kv-heads": 2,
    "head-dim": 128,
    "vocabulary": 512,
    "linear-heads": 2,
}


@pytest.mark.slow
def test_a_right_head_and_a_wrong_one_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    told = ["--noise", "0", "50", "--rounds", "2", "--new-tokens", "40", "--threads", "1"]
    assert main([str(tmp_path), *told, *sizes]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    figures = found["figures"]
    assert figures["accepted_0"]["median"] > 0.8
    assert figures["ratio_0"]["median"] > 0
    assert figures["ratio_1"]["median"] > 0
    assert found["size"]["hidden"] == TINY["hidden"]
