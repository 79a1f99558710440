"""A service with limits: what a server must hold whatever route a request took, and the same for Python programs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_onnx.errors import (
    DeadlineError,
    OverloadedError,
    QwenOnnxError,
    RateLimitError,
    RequestError,
    WorkerDiedError,
)
from qwen_onnx.runtime.engines.interface import Handle, Listener, TokenEvent
from qwen_onnx.runtime.processing.sanitise import Sanitiser, sanitised
from qwen_onnx.runtime.processing.template import check_depth
from qwen_onnx.runtime.service.answers import Answer
from qwen_onnx.runtime.service.generation import DEFAULT, ChatPrompt, Delta, GenerationConfig, Prompt
from qwen_onnx.runtime.service.limits import RateLimiter
from qwen_onnx.runtime.service.monitor import Measurement, QwenMonitor, Stopwatch, Thresholds
from qwen_onnx.runtime.service.policy import STRICT, Policy
from qwen_onnx.runtime.service.qwen import QwenService
from qwen_onnx.runtime.service.slots import Slots
from qwen_onnx.runtime.service.text import Prepared, TextService, is_ids
from qwen_onnx.runtime.service.told import PromptHash, RequestRecord, current

Observer = Callable[[Measurement], None]
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
# values that are names out of a short list, and values whose whole content is the client's
OWN, FREE = frozenset({"role", "type"}), frozenset({"parameters", "arguments"})


class GuardedService(TextService):
    """A running service behind a policy.

    Args:
        inner: the service; closing this one closes it.
        observers: told of every generation that ended.
    """

    def __init__(self, inner: TextService, policy: Policy, observers: Sequence[Observer] = ()) -> None:
        self._inner = inner
        self.tokenizer, self.template, self.engine = inner.tokenizer, inner.template, inner.engine
        self.sees, self.hears, self.fingerprint = inner.sees, inner.hears, inner.fingerprint
        self.transcribes, self.most_tokens = inner.transcribes, policy.max_tokens
        self.policy, self._observers = policy, tuple(observers)
        if self.template:
            self.template.seconds = policy.request_seconds
        self._hash = PromptHash(policy.log_key)
        self.slots = Slots(policy.max_concurrent)

    def prepare(self, prompt: Prompt, config: GenerationConfig) -> Prepared:
        """Token ids of a prompt that the policy allows.

        Raises:
            RequestError: an unknown role, too many characters or tokens asked for; and see ``QwenService.prepare``.
        """
        return self._prepared(prompt, self._bounded(config))

    def _prepared(self, prompt: Prompt, config: GenerationConfig) -> Prepared:
        self._check_load()
        if isinstance(prompt, Prepared):
            return self._inner.prepare(prompt, config)
        _check_roles(prompt)
        self._check_length(prompt)
        begin = time.monotonic()
        prompt = _sanitised_prompt(prompt) if self.policy.sanitise else prompt
        prepared = self._inner.prepare(prompt, config)
        return Prepared(prepared, time.monotonic() - begin, prepared.media)

    def _check_load(self) -> None:
        """What cannot be served now is refused before a stream has begun: afterwards there is no status to tell it."""
        stats = self.engine.stats()
        if not stats.alive:
            raise WorkerDiedError("the engine's process died; it is started again", retry_after=5)
        if stats.full:
            raise OverloadedError(f"{stats.waiting} requests wait already", hint="try again later")

    def _check_length(self, prompt: Prompt) -> None:
        most = self.policy.max_input_characters
        if most is None:
            return
        count = len(self.tokenizer.decode(self._known_ids(prompt))) if is_ids(prompt) else characters(prompt)
        if count > most:
            raise RequestError(
                f"the input has {count} characters, the most is {most}", where="input", hint="send less text"
            )

    def _known_ids(self, prompt: Any) -> list[int]:
        vocabulary = self.engine.shape.vocab_size
        # unknown ids are refused by ``prepare``, which names them
        return [token for token in prompt if 0 <= token < vocabulary]

    def _bounded(self, config: GenerationConfig) -> GenerationConfig:
        """The config under the cap; the default, which nobody asked for, gives way in silence."""
        most = self.policy.max_tokens
        if most is not None and config.max_new_tokens > most:
            if config.max_new_tokens != DEFAULT.max_new_tokens:
                raise RequestError(
                    f"max_tokens is {config.max_new_tokens}, the most is {most}",
                    where="max_tokens",
                    hint="ask for less",
                )
            config = replace(config, max_new_tokens=most)
        if self.policy.sanitise and config.logprobs is not None:
            raise RequestError("logprobs would tell what `sanitise` removes", where="logprobs", hint="leave them out")
        return config

    def submit(self, prompt: Prompt, config: GenerationConfig, listener: Listener) -> tuple[Handle, Answer]:
        """See ``QwenService.submit``; the config is bounded first, and the answer is watched.

        After ``request_seconds`` the listener hears of a DeadlineError.
        """
        record = current.get()
        if record is not None:
            record.prompt_hash = self._hash.of(prompt)
        client = record.client if record else None
        if not self.slots.take(client):
            raise RateLimitError(
                f"{self.slots.most} of your answers are under way already", hint="wait for one of them", retry_after=1
            )
        run = _Run(self, record, client)
        try:
            config = self._bounded(config)
            ids = self._prepared(prompt, config)
            run.begin(*self._inner.submit(ids, config, listener), listener, ids.seconds)
        except QwenOnnxError as error:
            run.end(error)
            raise
        return run, run

    def close(self) -> None:
        """See ``TextService``."""
        self._inner.close()

    def ended(self, measurement: Measurement) -> None:
        """Tell everybody of a generation."""
        for observer in self._observers:
            observer(measurement)


class _Run:
    """One generation under watch, its own handle and answer: stopwatch, filter, deadline, and its request's record."""

    def __init__(self, service: GuardedService, record: RequestRecord | None, client: str | None) -> None:
        self._service, self._record, self._client = service, record, client
        self._watch = Stopwatch(time.monotonic)
        self._sanitiser = Sanitiser() if service.policy.sanitise else None
        self._timer: threading.Timer | None = None
        self._ended = threading.Lock()

    def begin(self, handle: Handle, answer: Answer, listener: Listener, spent: float) -> None:
        """It was submitted; ``spent`` seconds of its time are gone."""
        self._handle, self._answer = handle, answer
        seconds = self._service.policy.request_seconds
        if seconds is None:
            return

        def late() -> None:
            error = DeadlineError(f"the answer was not finished within {seconds:g} s")
            listener(TokenEvent(error=error))
            handle.cancel()

        self._timer = threading.Timer(max(seconds - spent, 0), late)
        self._timer.daemon = True
        self._timer.start()

    @property
    def finished(self) -> bool:
        """See ``Answer``."""
        return self._answer.finished

    def feed(self, event: TokenEvent) -> list[Delta]:
        """See ``Answer``."""
        try:
            deltas = [piece for delta in self._answer.feed(event) for piece in self._pieces(delta)]
        except QwenOnnxError as error:
            self.end(error)
            raise
        if self.finished:
            self.end(None)
        return deltas

    def _pieces(self, delta: Delta) -> Iterator[Delta]:
        """What may go out of a piece."""
        self._watch.piece(delta)
        if self._sanitiser is None:
            yield delta
            return
        ends = delta.finish_reason is not None
        text = self._sanitiser.push(delta.text) + (self._sanitiser.flush() if ends else "")
        if text or ends:
            yield replace(delta, text=text)

    def cancel(self) -> None:
        """See ``Handle``. Whoever cancels before the end wants no more: the client left, or the server goes."""
        self._handle.cancel()
        self.end(None, cancelled=True)

    def end(self, error: BaseException | None, *, cancelled: bool = False) -> None:
        """Tell of the end, once."""
        if not self._ended.acquire(blocking=False):
            return
        self._service.slots.give(self._client)
        if self._timer:
            self._timer.cancel()
        measurement = self._watch.stop(error)
        if cancelled:
            measurement.fault, measurement.finish_reason = "Cancelled", "cancelled"
        if self._record is not None:
            self._record.generations.append(measurement)
        self._service.ended(measurement)


def characters(prompt: Any) -> int:
    """Of all text that a client sends: every string but roles, kinds of parts, and the names of the API's own fields.

    Within schemas and arguments, whose names are the client's too, names and numbers count as well.
    """
    waiting: list[tuple[Any, bool]] = [(prompt, False)]
    count = 0
    while waiting:
        value, free = waiting.pop()
        if isinstance(value, str):
            count += len(value)
        elif isinstance(value, ChatPrompt):
            waiting += [(list(value.messages), False), (list(value.tools), False), (value.schema or {}, True)]
        elif isinstance(value, Mapping):
            waiting += [(item, free or key in FREE) for key, item in value.items() if free or key not in OWN]
            count += sum(len(str(key)) for key in value) if free else 0
        elif isinstance(value, list | tuple):
            waiting += [(item, free) for item in value]
        elif free:
            # an integer of more than 4,300 digits has no text
            count += value.bit_length() * 3 // 10 + 1 if isinstance(value, int) else len(str(value))
    return count


def _check_roles(prompt: Prompt) -> None:
    messages = prompt.messages if isinstance(prompt, ChatPrompt) else prompt
    if isinstance(messages, str) or is_ids(prompt):
        return
    for message in messages:
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise RequestError(f"there is no role {role!r}; known: {', '.join(sorted(ROLES))}", where="messages.role")


def _sanitised_prompt(prompt: Prompt) -> Prompt:
    if isinstance(prompt, ChatPrompt):
        check_depth(prompt.messages)
        return replace(prompt, messages=sanitised(prompt.messages))
    if is_ids(prompt):
        # ids are no text: what they spell comes back in the output at most, which is filtered
        return prompt
    check_depth(prompt)
    made: Prompt = sanitised(prompt)
    return made


class SecureQwenService(GuardedService):
    """An artifact that answers within limits, watched by a monitor: what the server holds, for Python programs.

    Args:
        folder: flat folder of an exported model.
        policy: limits of one generation.
        rate_limit: generations in an hour, whatever the policy says; None: no limit.
        thresholds: of the monitor.
        clock: seconds, for the rate limit.
        options: those of ``QwenService``.

    Raises:
        ArtifactError: the folder holds no model that loads.
    """

    def __init__(
        self,
        folder: Path | str,
        policy: Policy | None = None,
        *,
        rate_limit: int | None = STRICT.rate_limit,
        thresholds: Thresholds | None = None,
        clock: Callable[[], float] = time.monotonic,
        **options: Any,
    ) -> None:
        inner = QwenService(folder, **options)
        self.monitor = QwenMonitor(inner, thresholds)
        super().__init__(inner, replace(policy or STRICT, rate_limit=rate_limit), (self.monitor.add,))
        self._limiter = RateLimiter(rate_limit, clock=clock) if rate_limit else None

    def submit(self, prompt: Prompt, config: GenerationConfig, listener: Listener) -> tuple[Handle, Answer]:
        """See ``GuardedService.submit``. Raises RateLimitError when the hour's generations are used up."""
        # faulty input costs nothing
        ids = self.prepare(prompt, config)
        wait = self._limiter.admit("python") if self._limiter else 0
        if wait:
            raise RateLimitError("the generations of this hour are used up", retry_after=wait)
        return super().submit(ids, config, listener)
