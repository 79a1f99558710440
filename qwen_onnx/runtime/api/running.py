"""Several generations at once behind one asynchronous iterator, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import TypeVar

from starlette.requests import Request

from qwen_onnx.errors import RequestError, ServiceError
from qwen_onnx.runtime.answers import Assembler
from qwen_onnx.runtime.generation import Delta, GenerationConfig
from qwen_onnx.runtime.requests import Handle, Listener, TokenEvent
from qwen_onnx.runtime.service import QwenService

Job = tuple[Sequence[int], GenerationConfig]
T = TypeVar("T")


class Generations:
    """Answers to jobs (prompt ids and how to answer), all of them under way together.

    Iterate once; ``cancel`` when done, whatever happened.
    """

    def __init__(self) -> None:
        self._started: list[tuple[Handle, Assembler]] = []
        self._events: asyncio.Queue[tuple[int, TokenEvent]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def begin(cls, service: QwenService, jobs: Sequence[Job]) -> Generations:
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

    def _submit(self, service: QwenService, jobs: Sequence[Job]) -> None:
        for index, (ids, config) in enumerate(jobs):
            self._started.append(service.submit(ids, config, self._listener(index)))

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
            for delta in _fed(assembler, event):
                yield index, delta
            if assembler.finished:
                # a stop string ends an answer that the engine would go on with
                self._started[index][0].cancel()

    def cancel(self) -> None:
        """Stop what still runs, within one step."""
        for handle, _ in self._started:
            handle.cancel()


def _fed(assembler: Assembler, event: TokenEvent) -> list[Delta]:
    try:
        return assembler.feed(event)
    except ServiceError as error:
        if error.where != "grammar":
            raise
        # the words go on with the parser's whole state
        words = error.what.splitlines()[0]
        raise RequestError(
            f"the schema is more than llguidance can follow: {words}", where="response_format"
        ) from error


class ClientLeft(Exception):
    """Nobody waits for the answer."""


async def unless_left(request: Request, work: Coroutine[None, None, T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves.

    Raises:
        ClientLeft: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for other in (task, gone):
            other.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
