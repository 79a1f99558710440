"""The benchmark of follow-up questions: what it says is what happened; no figure is judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import follow_up
from qwen_onnx.errors import ConfigError
from tests.fixtures.vision import seeing_artifact

__all__ = ["seeing_artifact"]


@pytest.mark.slow
def test_a_round_is_paired_and_the_cache_has_the_picture(
    seeing_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(seeing_artifact), "--rounds", "2", "--side", "200", "--threads", "1"]
    assert follow_up.main([*arguments, "--gate", "follow_up_cached_tokens>=49", "--gate", "prompt_tokens<=10"]) == 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    figures = told["figures"]
    assert {figure["count"] for figure in figures.values()} == {2}
    for name in ("follow_up", "other_beginning", "unseen"):
        assert figures[f"{name}_ratio"]["median"] > 0
        assert figures[f"{name}_ttft_ms"]["median"] > 0
    assert figures["prompt_tokens"]["median"] > figures["follow_up_cached_tokens"]["median"] >= 49
    assert (told["artifact"], told["side"], told["rounds"]) == (seeing_artifact.name, 200, 2)


def test_a_model_of_text_is_refused_before_a_server_starts(tiny_artifact: Path) -> None:
    with pytest.raises(ConfigError, match="reads no pictures"):
        follow_up.main([str(tiny_artifact)])


def test_pictures_differ_and_come_again() -> None:
    assert follow_up.photograph(32, 1) == follow_up.photograph(32, 1) != follow_up.photograph(32, 2)
