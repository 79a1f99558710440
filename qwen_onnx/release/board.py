"""What runs just now: lines that change in a terminal, lines that stay elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


class Board:
    """Progress of the jobs of a release, for the length of a with block."""

    def __init__(self, console: Console) -> None:
        self._console, self._begin = console, time.monotonic()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TextColumn("{task.fields[at]}"),
            TimeElapsedColumn(),
        )
        self._live = Progress(*columns, console=console, disable=not console.is_terminal)
        self._rows: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, job: str, at: str) -> None:
        """``job`` is at this step now."""
        if not self._console.is_terminal:
            seconds = time.monotonic() - self._begin
            self._console.print(f"› {seconds:7.1f} s  {job}: {at}", markup=False, highlight=False, soft_wrap=True)
            return
        if job not in self._rows:
            self._rows[job] = self._live.add_task(escape(job), total=1, at=at)
        ended = at.startswith(("passed", "FAILED", "finished"))
        self._live.update(self._rows[job], at=escape(at), completed=int(ended))
