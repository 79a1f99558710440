"""The benchmark of int8 keys and values: it runs, and says what a token takes; no figure is judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.kv_cache import main
from qwen_onnx.errors import ConfigError


def test_a_run_gives_a_table_and_one_line_of_json(exact_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(exact_artifact), "--depths", "70", "16", "--rounds", "1", "--threads", "1"]
    assert main([*arguments, "--gate", "decode_4_behind_70_ratio>=1000"]) == 1
    told = capsys.readouterr()
    assert "gate: decode_4_behind_70_ratio is" in told.err
    found = json.loads(told.out.splitlines()[-1])
    assert found["kv_token_bytes"] * 4 == found["kv_token_float_bytes"]
    kinds = [f"{kind}_behind_{depth}" for depth in (16, 70) for kind in ("prefill", "decode_1", "decode_4")]
    for name in [f"{kind}_{figure}" for kind in kinds for figure in ("ratio", "tok_s", "float_tok_s")]:
        assert found["figures"][name]["median"] > 0


def test_a_depth_beyond_the_context_is_refused(exact_artifact: Path) -> None:
    with pytest.raises(ConfigError, match="the model's context holds 8192 tokens"):
        main([str(exact_artifact), "--depths", "8190"])
