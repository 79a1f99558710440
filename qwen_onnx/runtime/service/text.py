"""One core, ``prepare`` and ``submit``, beneath the synchronous, asynchronous and batch forms of an answer."""

from __future__ import annotations

import queue
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any, Self

from qwen_onnx.errors import QwenOnnxError, TemplateError
from qwen_onnx.runtime.engines.adapters import AdapterSource
from qwen_onnx.runtime.engines.genai import Cancelled
from qwen_onnx.runtime.engines.interface import EngineStats, Handle, Listener, TokenEngine, TokenEvent
from qwen_onnx.runtime.engines.media import Medium
from qwen_onnx.runtime.processing.template import ChatTemplate, Message
from qwen_onnx.runtime.processing.tokenizer import TextTokenizer
from qwen_onnx.runtime.service.answers import Answer
from qwen_onnx.runtime.service.generation import DEFAULT, ChatPrompt, Completion, Delta, GenerationConfig, Prompt
from qwen_onnx.runtime.service.generations import Generations

# seconds between two looks at ``cancelled`` while no token comes
POLL = 0.05


class Prepared(list[int]):
    """Token ids that ``prepare`` has let pass; they are not rendered, encoded or checked again.

    Args:
        seconds: that it took to prepare them; they count into the time for the answer.
        media: that the ids have room for.
    """

    def __init__(self, ids: Sequence[int], seconds: float = 0.0, media: tuple[Medium, ...] = ()) -> None:
        super().__init__(ids)
        self.seconds, self.media = seconds, media


class TextService(ABC):
    """Text in, text out. ``prepare`` and ``submit`` are where every form of generation passes."""

    tokenizer: TextTokenizer
    # None: a base model, which continues plain text all the same; the fault is told when a chat comes
    template: ChatTemplate | None
    engine: TokenEngine
    # whether it takes pictures, and sounds
    sees: bool
    hears: bool
    # whether it is made to write down what is said
    transcribes: bool
    # of an answer; None: what the context leaves
    most_tokens: int | None = None
    # changes with the artifact: OpenAI's ``system_fingerprint``
    fingerprint: str

    @abstractmethod
    def prepare(self, prompt: Prompt, config: GenerationConfig) -> Prepared:
        """Token ids of ``prompt``, checked against the context; see ``QwenService.prepare``."""

    @abstractmethod
    def submit(self, prompt: Prompt, config: GenerationConfig, listener: Listener) -> tuple[Handle, Answer]:
        """Begin an answer; see ``QwenService.submit``."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of those that a config may ask for now."""
        return tuple(adapter.name for adapter in self.engine.adapters)

    def load_adapter(self, name: str, file: Path) -> None:
        """Load an adapter; see ``TokenEngine.load_adapter``.

        Raises:
            ConfigError: it cannot be called so. ArtifactError: the file cannot be read, or does not fit.
            RequestError, OverloadedError, WorkerDiedError: it cannot be loaded, or not now.
        """
        self.engine.load_adapter(AdapterSource.of(name, file))

    def unload_adapter(self, name: str) -> None:
        """Drop an adapter; see ``TokenEngine.unload_adapter``."""
        self.engine.unload_adapter(name)

    def room(self, ids: Sequence[int]) -> int:
        """How many tokens the context leaves for an answer."""
        return self.engine.shape.context_length - len(ids)

    def format_chat(self, messages: Sequence[Message] | ChatPrompt) -> str:
        """The prompt that the template makes of ``messages``; TemplateError when it refuses them."""
        chat = as_chat(messages)
        return self._chat_template().render(chat.messages, **variables(chat))

    def _chat_template(self) -> ChatTemplate:
        if self.template is None:
            raise TemplateError("this model has no chat template", where="messages", hint="give plain text: generate")
        return self.template

    def encode_chat(
        self, messages: Sequence[Message] | ChatPrompt, change: Callable[[str], str] = lambda rendered: rendered
    ) -> list[int]:
        """Token ids of that prompt; special tokens that users typed stay text. ``change``: see the template."""
        chat = as_chat(messages)
        context = self.engine.shape.context_length
        ids = self._chat_template().encode(chat.messages, self.tokenizer, context, change=change, **variables(chat))
        begun = self.tokenizer.encode(chat.prefill, allow_special=True, add_special_tokens=False)
        return ids + begun if chat.prefill else ids

    def stream(
        self, prompt: Prompt, config: GenerationConfig = DEFAULT, *, cancelled: Cancelled | None = None
    ) -> Iterator[Delta]:
        """Yield the answer piece by piece; the last piece tells why it ended. Closing the iterator stops it.

        Faulty input raises at the call. ``cancelled`` is asked between tokens; when it says so, the answer ends.
        """
        events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        handle, assembler = self.submit(prompt, config, events.put)
        return self._deltas(events, handle, assembler, cancelled)

    def _deltas(
        self, events: queue.SimpleQueue[TokenEvent], handle: Handle, assembler: Answer, cancelled: Cancelled | None
    ) -> Iterator[Delta]:
        try:
            while not assembler.finished:
                try:
                    event = events.get(timeout=POLL if cancelled else None)
                except queue.Empty:
                    event = None
                if cancelled and cancelled():
                    handle.cancel()
                    cancelled = None
                if event:
                    yield from assembler.feed(event)
        finally:
            handle.cancel()

    def generate(self, prompt: Prompt, config: GenerationConfig = DEFAULT) -> Completion:
        """The whole answer at once."""
        return Completion.of(list(self.stream(prompt, config)))

    async def generate_async(self, prompt: Prompt, config: GenerationConfig = DEFAULT) -> AsyncIterator[Delta]:
        """Like ``stream``, for an event loop. Closing the iterator stops the generation within one step.

        Encoding a long prompt takes a while: a thread does it.
        """
        running = await Generations.begin(self, [(prompt, config)])
        try:
            async for _, delta in running:
                yield delta
        finally:
            running.cancel()

    def generate_batch(self, prompts: Sequence[Prompt], config: GenerationConfig = DEFAULT) -> list[Completion]:
        """Answers in the order of ``prompts``, computed together as far as the engine has streams.

        Rounding depends on what is computed together: answers may differ from those of ``generate``, unless the
        config has a seed, which makes them equal and forgoes the speed. All prompts are checked before the first is
        answered.
        """
        prepared = []
        for index, prompt in enumerate(prompts):
            try:
                prepared.append(self.prepare(prompt, config))
            except QwenOnnxError as error:
                error.add_note(f"prompt {index} of the batch")
                raise
        # a thread of a pool starts without the caller's context, which says whose requests these are
        contexts = [copy_context() for _ in prepared]
        with ThreadPoolExecutor(max(1, self.engine.stats().streams), "qwen-onnx batch") as pool:
            return list(pool.map(lambda context, ids: context.run(self.generate, ids, config), contexts, prepared))

    def stats(self) -> EngineStats:
        """What the engine does now."""
        return self.engine.stats()

    @abstractmethod
    def close(self) -> None:
        """Free the model and end the processes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_ids(prompt: Prompt) -> bool:
    """Whether a prompt is given as token ids."""
    return not isinstance(prompt, str | ChatPrompt) and bool(prompt) and isinstance(prompt[0], int)


def as_chat(messages: Sequence[Message] | ChatPrompt) -> ChatPrompt:
    """Bare messages are a conversation without tools."""
    return messages if isinstance(messages, ChatPrompt) else ChatPrompt(messages)


def variables(chat: ChatPrompt) -> dict[str, Any]:
    """What the template is told beside the messages; transformers' names."""
    told: dict[str, Any] = {"tools": list(chat.tools)} if chat.tools else {}
    return told if chat.thinking is None else {**told, "enable_thinking": chat.thinking}
