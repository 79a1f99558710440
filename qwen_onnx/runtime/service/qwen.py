"""Text in, text out: one core generator beneath the synchronous, asynchronous and batch forms."""

from __future__ import annotations

import hashlib
import queue
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import fields
from pathlib import Path
from typing import Any, Self, cast

from qwen_onnx.artifact.seal import Seal
from qwen_onnx.errors import PromptTooLongError, QwenOnnxError, RequestError, TemplateError
from qwen_onnx.runtime.engines.genai import CONFIG_FILE, Cancelled
from qwen_onnx.runtime.engines.interface import (
    EngineStats,
    Handle,
    Listener,
    TokenEngine,
    TokenEvent,
    TokenRequest,
    cache_scope,
)
from qwen_onnx.runtime.engines.loading import EngineOptions, load_verified
from qwen_onnx.runtime.engines.remote import RemoteEngine
from qwen_onnx.runtime.processing.template import ChatTemplate, has_template
from qwen_onnx.runtime.processing.tokenizer import TextTokenizer, check_size
from qwen_onnx.runtime.service.answers import Answer, Assembler
from qwen_onnx.runtime.service.generation import (
    DEFAULT,
    ChatPrompt,
    Completion,
    Delta,
    GenerationConfig,
    Message,
    Prompt,
    Sampling,
)
from qwen_onnx.runtime.service.generations import Generations

# seconds between two looks at ``cancelled`` while no token comes
POLL = 0.05


class QwenService:
    """An artifact that answers.

    Args:
        folder: flat folder of an exported model.
        threads: threads of onnxruntime; None leaves it to onnxruntime.
        isolated: run the engine in a child process, so that this one's event loop stays free.
        streams: answers at once; queue_size: how many requests may wait beyond them.
        context: tokens of one conversation; None: the model's, or what the memory allows.

        verify: check every byte before it is loaded, and again whenever an isolated engine is started anew.
        expect: verify, and refuse what has another digest; see ``artifact.seal.runnable_digest``.

    Raises:
        ArtifactError: the folder holds no model that loads, or not the verified one.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        threads: int | None = None,
        isolated: bool = False,
        streams: int = 4,
        queue_size: int = 16,
        context: int | None = None,
        verify: bool = False,
        expect: str | None = None,
    ) -> None:
        folder = Path(folder)
        options = EngineOptions(streams, queue_size, context, threads, verify or expect is not None, expect)
        # before anything else is read: it is the engine that verifies
        self.engine, seal = _engine(folder, options, isolated)
        try:
            self.tokenizer = TextTokenizer(folder)
            # a base model has no template and continues plain text all the same: the fault is told when a chat comes
            self.template = ChatTemplate(folder) if has_template(folder) else None
            self.fingerprint = _fingerprint(folder)
            if seal:
                seal.require_untouched()
        except BaseException:
            self.engine.close()
            raise

    def format_chat(self, messages: Sequence[Message] | ChatPrompt) -> str:
        """The prompt that the template makes of ``messages``; TemplateError when it refuses them."""
        chat = as_chat(messages)
        return self._chat_template().render(chat.messages, **variables(chat))

    def _chat_template(self) -> ChatTemplate:
        if self.template is None:
            raise TemplateError("this model has no chat template", where="messages", hint="give plain text: generate")
        return self.template

    def encode_chat(self, messages: Sequence[Message] | ChatPrompt) -> list[int]:
        """Token ids of that prompt; special tokens that users typed stay text."""
        chat = as_chat(messages)
        context = self.engine.shape.context_length
        return self._chat_template().encode(chat.messages, self.tokenizer, context, **variables(chat))

    def prepare(self, prompt: Prompt, config: GenerationConfig) -> list[int]:
        """Token ids of ``prompt``, checked against the context.

        Raises:
            RequestError, PromptTooLongError, TemplateError.
        """
        context = self.engine.shape.context_length
        if isinstance(prompt, str):
            check_size(len(prompt), context)
            ids = self.tokenizer.encode(prompt)
        elif is_ids(prompt):
            ids = list(cast("Sequence[int]", prompt))
        else:
            ids = self.encode_chat(cast("Sequence[Message] | ChatPrompt", prompt))
        room = context - len(ids)
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, the context holds {context}", where="prompt", hint="shorten it"
            )
        self.engine.shape.check(ids, 1)
        outside = next((token for token in config.logit_bias if not 0 <= token < self.engine.shape.vocab_size), None)
        if outside is not None:
            raise RequestError(f"logit_bias names token {outside}, which does not exist", where="logit_bias")
        return ids

    def submit(self, prompt: Prompt, config: GenerationConfig, listener: Listener) -> tuple[Handle, Answer]:
        """Begin an answer; ``listener`` gets the engine's events, which the assembler makes pieces of.

        ``max_new_tokens`` is bounded by what the context leaves.

        Raises:
            RequestError, PromptTooLongError, TemplateError: faulty input.
            OverloadedError, WorkerDiedError: it cannot be served now.
        """
        ids = self.prepare(prompt, config)
        most = min(config.max_new_tokens, self.engine.shape.context_length - len(ids))
        request = TokenRequest(
            tuple(ids),
            most,
            sampling(config),
            logprobs=config.logprobs,
            grammar=config.grammar,
            cache_scope=cache_scope.get(),
        )
        return self.engine.submit(request, listener), Assembler(self.tokenizer, config, len(ids))

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

    def close(self) -> None:
        """Free the model."""
        self.engine.close()

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


def sampling(config: GenerationConfig) -> Sampling:
    """The part of a config that chooses tokens."""
    return Sampling(**{field.name: getattr(config, field.name) for field in fields(Sampling)})


def _engine(folder: Path, options: EngineOptions, isolated: bool) -> tuple[TokenEngine, Seal | None]:
    if not isolated:
        return load_verified(folder, options)
    engine = RemoteEngine(folder, options)
    return engine, engine.seal


def _fingerprint(folder: Path) -> str:
    """Changes with the artifact: OpenAI's ``system_fingerprint``."""
    manifest = folder / "manifest.json"
    content = (manifest if manifest.exists() else folder / CONFIG_FILE).read_bytes()
    return f"fp_{hashlib.sha256(content).hexdigest()[:12]}"
