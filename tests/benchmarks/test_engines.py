"""The benchmark of both engines: it runs, and says what needed no computing; no figure is judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.engines import LONG, main


def test_a_run_gives_a_table_and_one_line_of_json(hybrid_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(hybrid_artifact), "--new-tokens", "60", "--rounds", "1", "--threads", "1"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert figures["turn_cached"]["median"] == LONG + 59
    assert figures["system_cached"]["median"] == LONG
    for kind, unit in (("decode_1", "tok_s"), ("decode_4", "tok_s"), ("turn", "ms"), ("system", "ms")):
        assert min(figures[f"{kind}_{name}"]["median"] for name in ("ratio", unit, f"genai_{unit}")) > 0
