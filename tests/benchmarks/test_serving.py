"""The serving benchmark: what it says is what happened; no figure is judged here."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from benchmarks.figures import Bound, Figure
from benchmarks.live import Answer, read_event, stream_chat
from benchmarks.serving import Window
from qwen_onnx.errors import ConfigError


def answer(*arrivals: float, tokens: int | None = None) -> Answer:
    return Answer(200, 0.0, list(arrivals), usage={} if tokens is None else {"completion_tokens": tokens})


def test_decode_counts_only_what_streams_give_together() -> None:
    """From the last first token, 2 s, to the first end, 5 s: three pieces of one stream and two of the other."""
    window = Window.of([answer(1, 2, 3, 4, 5), answer(2, 3.5, 4.5, 6, 7)])
    assert window is not None
    assert window.tok_s == pytest.approx(5 / 3)
    assert window.gaps_ms == pytest.approx((1000, 1000, 1000, 1500, 1000))


def test_a_piece_counts_as_many_tokens_as_the_usage_says() -> None:
    window = Window.of([answer(1, 2, 3, tokens=6)])
    assert window is not None
    assert window.tok_s == pytest.approx(2)


@pytest.mark.parametrize("answers", [[answer(1, 2), answer(2, 3)], [answer(1, 2), answer()], [answer(1)]])
def test_streams_that_do_not_overlap_have_no_speed(answers: list[Answer]) -> None:
    assert Window.of(answers) is None


def test_a_figure_has_its_spread_and_leaves_out_what_is_missing() -> None:
    figure = Figure.of([3.0, 1.0, math.nan, 2.0])
    assert figure is not None
    assert (figure.median, figure.least, figure.most, figure.count) == (2.0, 1.0, 3.0, 3)
    assert 1.0 <= figure.low <= 2.0 <= figure.high <= 3.0
    assert Figure.of([math.nan]) is None


def test_bounds_are_kept_or_broken() -> None:
    figures = {"ratio": Figure.of([2.3]), "lag": None}
    assert Bound.parse("ratio>=2.2").broken(figures) is None
    assert "2.3" in (Bound.parse("ratio >= 2.4").broken(figures) or "")
    assert Bound.parse("ratio<=2.4").broken(figures) is None
    assert "not measured" in (Bound.parse("lag<=20").broken(figures) or "")
    with pytest.raises(ConfigError, match="no figure 'typo'"):
        Bound.parse("typo<=1").broken(figures)
    with pytest.raises(ConfigError, match="NAME>=VALUE"):
        Bound.parse("ratio=2")


def test_an_error_in_a_stream_is_a_fault() -> None:
    streamed = answer()
    read_event(streamed, {"error": {"message": "the engine died"}})
    assert "the engine died" in (streamed.fault or "")


def test_line_separators_of_unicode_do_not_end_an_event() -> None:
    text = "a\u2028b\x85c"
    event = json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": "stop"}]}, ensure_ascii=False)
    served = httpx.MockTransport(lambda _: httpx.Response(200, text=f"data: {event}\r\n\r\ndata: [DONE]\n\n"))

    async def ask() -> Answer:
        async with httpx.AsyncClient(transport=served, base_url="http://test") as client:
            return await stream_chat(client, {})

    streamed = asyncio.run(ask())
    assert streamed.text == text
    assert streamed.fault is None


def run_benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.serving", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.release
def test_a_run_gives_a_table_and_one_line_of_json(tiny_artifact: Path) -> None:
    options = ("--rounds", 1, "--new-tokens", 24, "--system-tokens", 128, "--threads", 1)
    done = run_benchmark(tiny_artifact, *options, "--prompt-tokens", 64, 128, "--gate", "64/lone_ttft_ms<=0.001")
    assert done.returncode == 1, done.stderr
    assert "gate: 64/lone_ttft_ms is" in done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert "64/lone_ttft_ms" in done.stdout.partition("{")[0], "the table"
    figures = told["figures"]
    for length in (64, 128):
        assert {f"{length}/decode_ratio_{n}" for n in (2, 4)} <= set(figures)
        assert figures[f"{length}/lone_ttft_ms"]["median"] > 0
        assert figures[f"{length}/lag_p50_ms"]["median"] <= figures[f"{length}/lag_max_ms"]["median"]
        assert told["prompt_tokens"][str(length)] >= length
    assert figures["batch_ratio"]["count"] == 1


def test_a_server_that_does_not_start_is_told(tmp_path: Path) -> None:
    done = run_benchmark(tmp_path, "--rounds", 1)
    assert done.returncode == 6
    assert "tokenizer" in done.stderr
    assert not done.stdout
