"""The monitor, on a clock and an engine's figures that the test sets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qwen_onnx.runtime.engines.interface import EngineStats
from qwen_onnx.runtime.server.metrics import Metrics
from qwen_onnx.runtime.service.generation import Completion, Delta
from qwen_onnx.runtime.service.monitor import MIB, Measurement, QwenMonitor, Thresholds

IDLE = EngineStats(
    kind="batch",
    streams=2,
    running=0,
    waiting=0,
    queue_size=4,
    kv_tokens=7,
    kv_capacity=100,
    prompt_tokens=11,
    cached_tokens=3,
    generated_tokens=5,
    restarts=1,
    resident_bytes=500 * MIB,
    drafted_tokens=9,
    accepted_tokens=8,
)


class Bench:
    """A monitor, and what it looks at."""

    def __init__(self, **thresholds: float) -> None:
        self.now, self.own, self.state = 100.0, 50 * MIB, IDLE
        self.monitor = QwenMonitor(
            self, Thresholds(**thresholds), clock=lambda: self.now, resident=lambda: self.own, isolated=True
        )

    def stats(self) -> EngineStats:
        return self.state

    def answer(self, ttft: float, seconds: float, tokens: int) -> None:
        with self.monitor.measure() as watch:
            self.now += ttft
            watch.piece(Delta("a", 4, 1))
            self.now += seconds - ttft
            watch.piece(Delta("", 4, tokens, "stop"))


def test_a_generation_is_measured() -> None:
    bench = Bench()
    bench.answer(ttft=0.5, seconds=2.5, tokens=21)
    [measured] = bench.monitor.last(5)
    assert measured.ttft == pytest.approx(0.5)
    assert measured.seconds == pytest.approx(2.5)
    assert measured.tokens_per_second == pytest.approx(10)
    assert (measured.prompt_tokens, measured.completion_tokens, measured.finish_reason) == (4, 21, "stop")
    assert measured.resident_bytes == 550 * MIB


def test_averages_are_those_of_the_last_ones_that_did_not_fail() -> None:
    bench = Bench()
    for seconds in (100, 2, 4):
        bench.answer(ttft=1, seconds=seconds, tokens=3)

    def fails() -> None:
        bench.now += 1000
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bench.monitor.measured(fails)()
    assert bench.monitor.last(1)[0].fault == "ZeroDivisionError"
    assert bench.monitor.averages(last=3)["seconds"] == pytest.approx(3)
    assert bench.monitor.averages(last=3)["requests"] == 2
    assert Bench().monitor.averages()["seconds"] is None


def test_a_decorated_function_is_measured() -> None:
    bench = Bench()

    @bench.monitor.measured
    def ask(question: str) -> Completion:
        bench.now += 3
        return Completion(question, "length", 5, 9)

    assert ask("x").text == "x"
    assert (bench.monitor.last(1)[0].seconds, bench.monitor.last(1)[0].completion_tokens) == (3, 9)


def test_nothing_known_is_healthy() -> None:
    assert Bench().monitor.health_check().status == "healthy"


@pytest.mark.parametrize(
    ("state", "answer", "grown", "failed", "status"),
    [
        ({}, (0.1, 9.9, 100), 999, None, "healthy"),
        ({}, (0.1, 10.1, 200), 0, "response_time", "degraded"),
        ({}, (0.1, 2.1, 10), 0, "speed", "degraded"),
        ({}, (0.1, 2.1, 11), 0, None, "healthy"),
        ({}, (0.1, 1, 100), 1001, "memory_growth", "degraded"),
        ({"running": 2, "waiting": 4}, (0.1, 1, 100), 0, "queue", "degraded"),
        ({"running": 2, "waiting": 3}, (0.1, 1, 100), 0, None, "healthy"),
        ({"alive": False}, (0.1, 1, 100), 0, "worker", "unhealthy"),
    ],
)
def test_each_check_has_its_threshold(
    state: dict[str, Any], answer: tuple[float, float, int], grown: int, failed: str | None, status: str
) -> None:
    bench = Bench()
    bench.answer(*answer)
    bench.state = replace(IDLE, resident_bytes=IDLE.resident_bytes + grown * MIB, **state)
    health = bench.monitor.health_check()
    assert health.status == status
    assert [check.name for check in health.checks if not check.ok] == ([failed] if failed else [])
    assert len(health.recommendations) == bool(failed)


def test_thresholds_can_be_set_and_old_answers_pass() -> None:
    bench = Bench(response_seconds=1, window_seconds=60)
    bench.answer(ttft=0.1, seconds=2, tokens=50)
    assert bench.monitor.health_check().status == "degraded"
    bench.now += 61
    assert bench.monitor.health_check().status == "healthy"


def test_the_metrics_are_the_engines_and_the_generations() -> None:
    metrics = Metrics(lambda: IDLE, lambda: 9)
    metrics.generation(Measurement(0, seconds=2.5, ttft=0.5, completion_tokens=21))
    metrics.generation(Measurement(0, fault="DeadlineError"))
    metrics.request("/v1/models", 200, None)
    metrics.request("/v1/models", 401, "unauthorized")
    lines = metrics.text().decode().splitlines()
    for line in (
        "qwen_onnx_queue_depth 0.0",
        "qwen_onnx_kv_tokens 7.0",
        "qwen_onnx_kv_capacity_tokens 100.0",
        "qwen_onnx_prompt_tokens_total 11.0",
        "qwen_onnx_cached_tokens_total 3.0",
        "qwen_onnx_generated_tokens_total 5.0",
        "qwen_onnx_drafted_tokens_total 9.0",
        "qwen_onnx_accepted_tokens_total 8.0",
        "qwen_onnx_engine_restarts_total 1.0",
        'qwen_onnx_resident_bytes{process="server"} 9.0',
        'qwen_onnx_time_to_first_token_seconds_bucket{le="0.5"} 1.0',
        'qwen_onnx_time_per_output_token_seconds_bucket{le="0.08"} 0.0',
        'qwen_onnx_time_per_output_token_seconds_bucket{le="0.15"} 1.0',
        'qwen_onnx_generation_faults_total{error="DeadlineError"} 1.0',
        'qwen_onnx_http_requests_total{route="/v1/models",status="401"} 1.0',
        'qwen_onnx_rejects_total{reason="unauthorized"} 1.0',
    ):
        assert line in lines, line
