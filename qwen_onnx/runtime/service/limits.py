"""How much a client may send: requests in a window of time, bytes, and JSON that is what it seems."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from qwen_onnx import bounded
from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.service.budget import BUDGET, Budget

HOUR = 3600.0
MOST_CLIENTS = 10_000
TOKEN_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


class RateLimiter:
    """At most ``limit`` requests in any ``window`` seconds for each client: a sliding window, not a counter of hours.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, limit: int, window: float = HOUR, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self._window, self._clock = limit, window, clock
        self._times: dict[str, deque[float]] = {}

    def admit(self, client: str) -> int:
        """0 when the request may pass, and is counted; else the whole seconds until one may."""
        now = self._clock()
        times = self._recent(client, now)
        if len(times) >= self.limit:
            wait = max(1, math.ceil(times[0] + self._window - now))
            # rounding must not send a client back too early
            return wait if times[0] <= now + wait - self._window else wait + 1
        times.append(now)
        return 0

    def remaining(self, client: str) -> int:
        """How many more may pass now."""
        return self.limit - len(self._recent(client, self._clock()))

    def _recent(self, client: str, now: float) -> deque[float]:
        if client not in self._times and len(self._times) >= MOST_CLIENTS:
            self._forget(now)
        times = self._times.setdefault(client, deque())
        while times and times[0] <= now - self._window:
            times.popleft()
        return times

    def _forget(self, now: float) -> None:
        """Those whose window is empty; when all are busy, the one that came first."""
        for client in [name for name, times in self._times.items() if not times or times[-1] <= now - self._window]:
            del self._times[client]
        if len(self._times) >= MOST_CLIENTS:
            del self._times[next(iter(self._times))]


def read_json(body: bytes, most_depth: int, budget: Budget = BUDGET) -> Any:
    """JSON of UTF-8, within a budget and without what parsers disagree about.

    Raises:
        RequestError: see ``bounded.read_json``; or more than ``budget`` has.
    """
    budget.check_size(body)
    # the budget counts values; here only what parsers disagree about is refused
    value = bounded.read_json(
        body,
        most_bytes=len(body),
        most_depth=most_depth,
        most_values=len(body) + 1,
        error=RequestError,
        what="the body",
    )
    budget.check(value)
    return value


def check_token_fields(value: Any, most: int) -> None:
    """RequestError when a request asks for more than ``most`` tokens, naming the field as the client wrote it."""
    for name in TOKEN_FIELDS if isinstance(value, dict) else ():
        asked = value.get(name)
        if isinstance(asked, int) and asked > most:
            raise RequestError(f"{name} is {asked}, the most is {most}", where=name)
