"""Prometheus metrics of one server, in a registry of its own: two servers in a process do not mix.

Names follow https://prometheus.io/docs/practices/naming/ and, for the times, the vocabulary of inference servers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qwen_onnx.runtime.engines.interface import EngineStats
from qwen_onnx.runtime.service.monitor import Measurement

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "qwen_onnx_"
TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TPOT_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5)
DURATION_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "queue_depth": ("requests that wait", lambda stats: stats.waiting),
    "queue_size": ("requests that may wait", lambda stats: stats.queue_size),
    "running_streams": ("requests that are answered now", lambda stats: stats.running),
    "streams": ("requests that can be answered at once", lambda stats: stats.streams),
    "kv_tokens": ("tokens in the KV cache, those kept for their prefix included", lambda stats: stats.kv_tokens),
    "kv_capacity_tokens": ("tokens that the KV cache holds at most", lambda stats: stats.kv_capacity),
    "kv_token_bytes": ("memory of one such token, 0: not known", lambda stats: stats.kv_token_bytes),
    "worker_alive": ("1 while the engine's process lives", lambda stats: float(stats.alive)),
}
COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "prompt_tokens": ("tokens that were read, without cached ones", lambda stats: stats.prompt_tokens),
    "cached_tokens": ("prompt tokens that the prefix cache had", lambda stats: stats.cached_tokens),
    "generated_tokens": ("tokens that were generated", lambda stats: stats.generated_tokens),
    "drafted_tokens": ("guessed tokens that were computed", lambda stats: stats.drafted_tokens),
    "accepted_tokens": ("guessed tokens that were right", lambda stats: stats.accepted_tokens),
    "engine_restarts": ("how often the engine's process was started again", lambda stats: stats.restarts),
}


class _Engine(Collector):
    """The engine's own figures, read when somebody looks."""

    def __init__(self, stats: Callable[[], EngineStats], resident: Callable[[], int]) -> None:
        self._stats, self._resident = stats, resident

    def collect(self) -> Iterator[Metric]:
        """One sample of each."""
        stats = self._stats()
        for name, (text, value) in GAUGES.items():
            yield GaugeMetricFamily(PREFIX + name, text, value(stats))
        for name, (text, value) in COUNTERS.items():
            yield CounterMetricFamily(PREFIX + name, text, value(stats))
        memory = GaugeMetricFamily(PREFIX + "resident_bytes", "resident memory by process", labels=["process"])
        memory.add_metric(["server"], self._resident())
        memory.add_metric(["worker"], stats.resident_bytes)
        yield memory


class Metrics:
    """What /metrics tells.

    Args:
        stats: of the engine.
        resident: bytes of the server's process.
    """

    def __init__(self, stats: Callable[[], EngineStats], resident: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(stats, resident))
        self._ttft = self._histogram("time_to_first_token_seconds", "from request to first text", TTFT_BUCKETS)
        self._tpot = self._histogram(
            "time_per_output_token_seconds", "after the first, mean of an answer", TPOT_BUCKETS
        )
        self._duration = self._histogram("generation_seconds", "from request to last token", DURATION_BUCKETS)
        self._requests = Counter(
            PREFIX + "http_requests", "answers by route and status", ["route", "status"], registry=self._registry
        )
        self._rejects = Counter(
            PREFIX + "rejects", "requests that were turned away, by reason", ["reason"], registry=self._registry
        )
        self._faults = Counter(
            PREFIX + "generation_faults", "generations that broke, by error", ["error"], registry=self._registry
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=buckets, registry=self._registry)

    def generation(self, measured: Measurement) -> None:
        """A generation ended."""
        if measured.fault is not None:
            self._faults.labels(measured.fault).inc()
            return
        self._duration.observe(measured.seconds)
        if measured.ttft is not None:
            self._ttft.observe(measured.ttft)
        speed = measured.tokens_per_second
        if speed:
            self._tpot.observe(1 / speed)

    def request(self, route: str, status: int, reason: str | None) -> None:
        """A request was answered; ``reason`` when it was turned away."""
        self._requests.labels(route, str(status)).inc()
        if reason:
            self._rejects.labels(reason).inc()

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self._registry)
