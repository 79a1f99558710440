"""Several generations at once behind one asynchronous iterator."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.engines.interface import EngineStats, Handle, Listener, TokenEvent
from qwen_onnx.runtime.service.answers import Answer
from qwen_onnx.runtime.service.generation import Delta, GenerationConfig, Prompt

Job = tuple[Prompt, GenerationConfig]


class Submitter(Protocol):
    """The part of a service that begins answers."""

    def submit(self, prompt: Prompt, config: GenerationConfig, listener: Listener) -> tuple[Handle, Answer]:
        """See ``QwenService.submit``."""

    def stats(self) -> EngineStats:
        """See ``QwenService.stats``."""


class Generations:
    """Answers to jobs (prompt and how to answer), all of them under way together.

    Iterate once; ``cancel`` when done, whatever happened.
    """

    def __init__(self) -> None:
        self._started: list[tuple[Handle, Answer]] = []
        self._events: asyncio.Queue[tuple[int, TokenEvent]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def begin(cls, service: Submitter, jobs: Sequence[Job]) -> Generations:
        """Submit all, so that what is refused is refused before a stream begins.

        Raises:
            QwenOnnxError: that of the first that was refused; none runs then.
        """
        stats = service.stats()
        most = stats.streams + stats.queue_size
        if len(jobs) > most:
            raise RequestError(f"{len(jobs)} answers in one request, this server holds {most}", where="n")
        running = cls()
        begun = False
        try:
            await asyncio.to_thread(running._submit, service, jobs)
            begun = True
        finally:
            if not begun:
                running.cancel()
        return running

    def _submit(self, service: Submitter, jobs: Sequence[Job]) -> None:
        for index, (prompt, config) in enumerate(jobs):
            self._started.append(service.submit(prompt, config, self._listener(index)))

    def _listener(self, index: int) -> Listener:
        def hand_over(event: TokenEvent) -> None:
            # a loop that was closed has nobody left to tell
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return hand_over

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """(index of the job, piece of its answer) until all have ended; raises the engine's error."""
        while not all(assembler.finished for _, assembler in self._started):
            index, event = await self._events.get()
            assembler = self._started[index][1]
            if assembler.finished:
                continue
            for delta in assembler.feed(event):
                yield index, delta
            if assembler.finished:
                # a stop string ends an answer that the engine would go on with
                self._started[index][0].cancel()

    def cancel(self) -> None:
        """Stop what still runs, within one step."""
        for handle, _ in self._started:
            handle.cancel()
