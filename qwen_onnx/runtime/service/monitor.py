"""How a service does: each generation measured, averages over the last ones, and a judgement in words."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

import psutil

from qwen_onnx.runtime.engines.interface import EngineStats
from qwen_onnx.runtime.service.generation import Completion, Delta

Status = Literal["healthy", "degraded", "unhealthy"]
MOST_KEPT = 1000
MIB = 1 << 20
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Thresholds:
    """What is still healthy.

    Args:
        response_seconds: mean time of a whole answer.
        memory_growth_mb: growth of resident memory since the first generation, in MiB.
        tokens_per_second: mean speed of one answer after its first token.
        window_seconds: older generations tell nothing of now; without newer ones speed and time pass.
    """

    response_seconds: float = 10.0
    memory_growth_mb: float = 1000.0
    tokens_per_second: float = 5.0
    window_seconds: float = 600.0


@dataclass
class Measurement:
    """One generation; times in seconds, ``begin`` on the monitor's clock.

    Args:
        resident_bytes: of this process and the engine's, after the generation.
        fault: name of the error that ended it.
    """

    begin: float
    seconds: float = 0.0
    ttft: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str | None = None
    fault: str | None = None
    resident_bytes: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token; None when there is no second one."""
        if self.ttft is None or self.completion_tokens < 2 or self.seconds <= self.ttft:
            return None
        return (self.completion_tokens - 1) / (self.seconds - self.ttft)


class Stopwatch:
    """Fills a measurement while pieces come."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.measurement = Measurement(clock())

    def piece(self, delta: Delta) -> Delta:
        """Take note of a piece and give it back."""
        told = self.measurement
        if told.ttft is None and delta.completion_tokens:
            told.ttft = self._clock() - told.begin
        told.prompt_tokens, told.completion_tokens = delta.prompt_tokens, delta.completion_tokens
        told.cached_tokens, told.finish_reason = delta.cached_tokens, delta.finish_reason
        return delta

    def pieces(self, deltas: Iterator[Delta]) -> Iterator[Delta]:
        """The same pieces, taken note of."""
        for delta in deltas:
            yield self.piece(delta)

    def whole(self, answer: Completion) -> Completion:
        """Take note of an answer that came at once: its time to the first token is not known."""
        told = self.measurement
        told.prompt_tokens, told.completion_tokens = answer.prompt_tokens, answer.completion_tokens
        told.cached_tokens, told.finish_reason = answer.cached_tokens, answer.finish_reason
        return answer

    def stop(self, fault: BaseException | None = None) -> Measurement:
        """The end."""
        self.measurement.seconds = self._clock() - self.measurement.begin
        self.measurement.fault = type(fault).__name__ if fault else None
        return self.measurement


class Watched(Protocol):
    """What a monitor asks of a service."""

    def stats(self) -> EngineStats:
        """Now."""


@dataclass(frozen=True)
class Check:
    """One point of a health check; ``value`` None: there is nothing to measure yet."""

    name: str
    ok: bool
    value: float | None
    limit: float
    unit: str


@dataclass(frozen=True)
class Health:
    """``unhealthy``: cannot answer. ``degraded``: answers, but a check failed; each that did has a recommendation."""

    status: Status
    checks: tuple[Check, ...]
    recommendations: tuple[str, ...] = field(default=())


ADVICE = {
    "response_time": "answers take {value:.1f} s on average (limit {limit:g} s): lower max_tokens, or add a replica",
    "memory_growth": "memory grew by {value:.0f} MiB (limit {limit:g} MiB): restart the server, and report a leak",
    "speed": "{value:.1f} tokens a second (limit {limit:g}): fewer --streams, more --threads, or a smaller model",
    "worker": "the engine's process is dead: it is started again; if it stays so, see the log and `qwen-onnx doctor`",
    "queue": "{value:.0f} requests wait and the queue is full ({limit:g}): add a replica, or lower the clients' rate",
}
# a slow server mends itself when it gets less to do; taken out of service it could not show that it has
FATAL = frozenset({"worker"})


class QwenMonitor:
    """Watches a service; thread-safe.

    Args:
        clock: seconds, monotonic.
        resident: bytes of this process; tests inject theirs.
        isolated: the engine has a process of its own; None: as the service's engine says.
    """

    def __init__(
        self,
        service: Watched,
        thresholds: Thresholds | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        resident: Callable[[], int] | None = None,
        isolated: bool | None = None,
    ) -> None:
        # an engine of this process would report this process a second time
        apart = hasattr(getattr(service, "engine", None), "pid")
        self._isolated = apart if isolated is None else isolated
        self._service, self._thresholds, self._clock = service, thresholds or Thresholds(), clock
        self._own = resident or (lambda: int(psutil.Process().memory_info().rss))
        self._kept: deque[Measurement] = deque(maxlen=MOST_KEPT)
        self._lock = threading.Lock()
        self._first_bytes: int | None = None

    @contextlib.contextmanager
    def measure(self) -> Iterator[Stopwatch]:
        """Measure the block; give the stopwatch what the service gives: ``piece``, ``pieces`` or ``whole``."""
        watch = Stopwatch(self._clock)
        fault: BaseException | None = None
        try:
            yield watch
        except BaseException as error:
            fault = error
            raise
        finally:
            self.add(watch.stop(fault))

    def measured(self, function: Callable[P, R]) -> Callable[P, R]:
        """A decorator for a function that returns a ``Completion``."""

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.measure() as watch:
                answer = function(*args, **kwargs)
                if isinstance(answer, Completion):
                    watch.whole(answer)
                return answer

        return wrapper

    def add(self, measurement: Measurement) -> None:
        """Keep a measurement."""
        measurement.resident_bytes = self.resident_bytes()
        with self._lock:
            self._first_bytes = self._first_bytes or measurement.resident_bytes
            self._kept.append(measurement)

    @property
    def failed(self) -> bool:
        """Whether the service cannot answer and will not come back by itself."""
        return self._service.stats().failed

    def resident_bytes(self) -> int:
        """Of this process and, when it is another, the engine's."""
        return self._own() + (self._service.stats().resident_bytes if self._isolated else 0)

    def last(self, count: int) -> list[Measurement]:
        """The newest ones, oldest first."""
        with self._lock:
            return list(self._kept)[-count:] if count > 0 else []

    def averages(self, last: int = 100) -> dict[str, float | None]:
        """Means over the last generations that did not fail; None where there is nothing to average."""
        return self._averages(self.last(last))

    def _averages(self, measured: Sequence[Measurement]) -> dict[str, float | None]:
        sound = [one for one in measured if one.fault is None]
        return {
            "requests": float(len(sound)),
            "seconds": _mean([one.seconds for one in sound]),
            "ttft": _mean([one.ttft for one in sound]),
            "tokens_per_second": _mean([one.tokens_per_second for one in sound]),
            "prompt_tokens": _mean([one.prompt_tokens for one in sound]),
            "completion_tokens": _mean([one.completion_tokens for one in sound]),
            "resident_mb": _mean([one.resident_bytes / MIB for one in sound]),
        }

    def health_check(self, last: int = 20) -> Health:
        """The state now, and over the last generations of ``window_seconds``."""
        limits, stats = self._thresholds, self._service.stats()
        since = self._clock() - limits.window_seconds
        means = self._averages([one for one in self.last(last) if one.begin + one.seconds >= since])
        growth = None if self._first_bytes is None else (self.resident_bytes() - self._first_bytes) / MIB
        slow, speed = means["seconds"], means["tokens_per_second"]
        checks = (
            Check("response_time", slow is None or slow <= limits.response_seconds, slow, limits.response_seconds, "s"),
            Check("memory_growth", (growth or 0) <= limits.memory_growth_mb, growth, limits.memory_growth_mb, "MiB"),
            Check(
                "speed", speed is None or speed >= limits.tokens_per_second, speed, limits.tokens_per_second, "tok/s"
            ),
            Check("worker", stats.alive, float(stats.alive), 1, "alive"),
            Check("queue", not stats.full, float(stats.waiting), float(stats.queue_size), "requests"),
        )
        failed = [check for check in checks if not check.ok]
        status: Status = "healthy" if not failed else "degraded"
        if any(check.name in FATAL for check in failed):
            status = "unhealthy"
        return Health(status, checks, tuple(_advice(check) for check in failed))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _advice(check: Check) -> str:
    values: dict[str, Any] = {"value": check.value, "limit": check.limit}
    return ADVICE[check.name].format(**values)
