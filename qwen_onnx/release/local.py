"""Jobs on this machine, some at a time."""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qwen_onnx.errors import EnvironmentFault
from qwen_onnx.processes.memory import total_memory
from qwen_onnx.release.job import Task, run_job
from qwen_onnx.release.records import JobResult
from qwen_onnx.release.store import Store

SayOf = Callable[[str, str], None]


class Room:
    """Memory for jobs: one waits until its bound fits beside the bounds of those that run."""

    def __init__(self, total: int) -> None:
        self._total, self._taken, self._changed = total, 0, threading.Condition()

    def take(self, amount: int) -> None:
        """Wait for ``amount`` bytes."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken + amount <= self._total)
            self._taken += amount

    def give(self, amount: int) -> None:
        """Give them back."""
        with self._changed:
            self._taken -= amount
            self._changed.notify_all()


def run_local(tasks: Sequence[Task], store: Store, workers: int, say: SayOf) -> Iterator[JobResult]:
    """Run ``tasks``, at most ``workers`` at a time, and yield their results as they end.

    The threads are daemons: Ctrl-C ends the program at once, and the guards end what it had started.

    Raises:
        EnvironmentFault: a job's bound is more memory than there is, which would bound nothing.
    """
    total = total_memory()
    if short := [task.job for task in tasks if task.job.memory > total]:
        told = "; ".join(f"{job.name} may take {job.memory / 1e9:g} GB" for job in short)
        raise EnvironmentFault(
            f"{told}, this machine has {total / 1e9:.3f} GB", hint="lower `memory` in the matrix, or --on ray"
        )
    room, waiting, ended = Room(total), queue.SimpleQueue[Task](), queue.SimpleQueue[Any]()
    for task in tasks:
        waiting.put(task)

    def work() -> None:
        while True:
            try:
                task = waiting.get_nowait()
            except queue.Empty:
                return
            room.take(task.job.memory)
            try:
                ended.put(run_here(task, store, say))
            # a fault of our own, which must stop the release and not this thread alone
            except Exception as error:  # noqa: BLE001
                ended.put(error)
            room.give(task.job.memory)

    for _ in range(min(workers, len(tasks))):
        threading.Thread(target=work, daemon=True, name="qwen-onnx release").start()
    for _ in tasks:
        result = ended.get()
        if isinstance(result, BaseException):
            raise result
        yield result


def run_here(task: Task, store: Store, say: SayOf) -> JobResult:
    """Run one job into the store."""
    folder = store.unfinished(task.job, uuid.uuid4().hex[:8])
    result = run_job(task, folder, lambda stage: say(task.job.name, stage))
    store.finish(task.job, folder, result)
    return result
