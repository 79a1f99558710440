"""The benchmark of guessed tokens: what it says is what happened; no figure is judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speculation import Answered, Pair, common, main, speed


def test_speeds_are_those_of_all_answers_together() -> None:
    assert speed([Answered((1, 2, 3), 1.0), Answered((1,) * 11, 2.0)]) == pytest.approx(4.0)
    short, long = Answered((1,) * 15, 1.0), Answered((1,) * 16, 1.0)
    assert Pair(long, long, 0, 0).long_enough
    assert not Pair(long, short, 0, 0).long_enough


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [((1, 2, 3, 4), (1, 2, 3, 4), 1.0), ((1, 2, 3, 4), (1, 2, 9, 4), 0.5), ((1, 2), (1,), 0.5), ((), (), 1.0)],
)
def test_answers_are_equal_up_to_the_first_other_token(
    one: tuple[int, ...], other: tuple[int, ...], share: float
) -> None:
    assert common(one, other) == share


@pytest.mark.slow
def test_a_run_gives_a_table_and_one_line_of_json(exact_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(exact_artifact), "--new-tokens", "24", "--rounds", "1", "--threads", "1"]
    assert main([*arguments, "--gate", "edit_tokens_per_step>=1000"]) == 1
    told = capsys.readouterr()
    assert "gate: edit_tokens_per_step is" in told.err
    found = json.loads(told.out.splitlines()[-1])
    assert found["rounds"] == 1
    figures = found["figures"]
    assert figures["edit_ratio"]["median"] > 0
    # in fp32 wide steps say what plain ones say
    assert figures["edit_equal"]["median"] == figures["summarise_equal"]["median"] == 1
    assert figures["edit_tokens_per_step"]["median"] > 1
    assert "edit_ratio" in told.out
