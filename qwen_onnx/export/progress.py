"""Lines of progress with the time that is left, for the process that reads them."""

from __future__ import annotations

import time
from collections.abc import Callable

# the parent process shows lines with this prefix
PROGRESS = "progress: "


def progress(message: str) -> None:
    """Print one line for the parent process."""
    # the quantisers' own bars end without a newline
    print(f"\n{PROGRESS}{message}", flush=True)


class Steps:
    """Counts equal steps and says how long the rest will take, from the mean of those done in this run.

    Args:
        what: what each line begins with.
        total: all steps, those that an earlier run finished included.
        say: takes each line.
    """

    def __init__(self, what: str, total: int, say: Callable[[str], None] = progress) -> None:
        self.what, self.total, self.say = what, total, say
        self.begun, self.done = time.monotonic(), 0

    def step(self, number: int) -> None:
        """Step ``number``, counted from 1, is finished."""
        self.done += 1
        seconds = (time.monotonic() - self.begun) / self.done * (self.total - number)
        left = f", about {duration(seconds)} left" if number < self.total else ""
        self.say(f"{self.what} {number} of {self.total}{left}")


def duration(seconds: float) -> str:
    """Seconds as people say them: ``40 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
