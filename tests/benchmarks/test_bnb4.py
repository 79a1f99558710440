"""NF4 and FP4 beside int4: every figure is measured, none is judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bnb4 import files_bytes


@pytest.mark.release
def test_a_run_gives_a_table_and_one_line_of_json(
    tiny_build: Path, exact_artifact: Path, tiny_checkpoint: Path
) -> None:
    command = [sys.executable, "-m", "benchmarks.bnb4", *map(str, (tiny_build, exact_artifact, tiny_checkpoint))]
    done = subprocess.run([*command, "--rounds", "2"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])["models"]
    assert list(found) == ["int4", "nf4", "fp4"]
    for name, row in found.items():
        assert name in done.stdout
        assert 0 < row["kld_lower"] <= row["kld"] <= row["kld_upper"]
        assert row["decode_tok_s"] > 0
    # other codes of as many bits
    assert found["nf4"]["bytes"] == pytest.approx(found["fp4"]["bytes"], rel=0.01)
    assert found["nf4"]["bytes"] < files_bytes(exact_artifact)
    assert found["nf4"]["kld"] != found["fp4"]["kld"]
