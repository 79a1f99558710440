"""Text in, text out: one core generator beneath the synchronous, asynchronous and batch forms."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, cast

from qwen_onnx.errors import PromptTooLongError, QwenOnnxError, TemplateError
from qwen_onnx.runtime.engine import Cancelled, Engine, RemoteEngine, SamplingOptions, TokenEngine
from qwen_onnx.runtime.generation import DEFAULT, ChatPrompt, Completion, Delta, GenerationConfig, Message, Prompt
from qwen_onnx.runtime.template import ChatTemplate, has_template
from qwen_onnx.runtime.tokenizer import StreamDecoder, TextTokenizer, check_size


class QwenService:
    """An artifact that answers.

    Args:
        folder: flat folder of an exported model.
        threads: threads of onnxruntime; None leaves it to onnxruntime.
        isolated: run the engine in a child process, so that this one's event loop stays free.

    Raises:
        ArtifactError: the folder holds no model that loads.
    """

    def __init__(self, folder: Path | str, *, threads: int | None = None, isolated: bool = False) -> None:
        folder = Path(folder)
        self.tokenizer = TextTokenizer(folder)
        # a base model has no template and continues plain text all the same: the fault is told when a chat comes
        self.template = ChatTemplate(folder) if has_template(folder) else None
        self.engine: TokenEngine = (RemoteEngine if isolated else Engine)(folder, threads=threads)
        self._turn = threading.Lock()

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
        return ids

    def stream(
        self, prompt: Prompt, config: GenerationConfig = DEFAULT, *, cancelled: Cancelled | None = None
    ) -> Iterator[Delta]:
        """Yield the answer piece by piece; the last piece tells why it ended.

        ``max_new_tokens`` is bounded by what the context leaves. Faulty input raises at the call.
        """
        return self._deltas(self.prepare(prompt, config), config, cancelled)

    def _deltas(self, ids: list[int], config: GenerationConfig, cancelled: Cancelled | None) -> Iterator[Delta]:
        most = min(config.max_new_tokens, self.engine.shape.context_length - len(ids))
        decoder, stopper = StreamDecoder(self.tokenizer), StopStrings(config.stop)
        count, reason = 0, "stop"
        with self._turn:
            tokens = self.engine.generate(ids, max_new_tokens=most, options=_sampling(config), cancelled=cancelled)
            for token in tokens:
                count += 1
                text = stopper.push(decoder.push(token))
                if text:
                    yield Delta(text, len(ids), count)
                if stopper.hit:
                    break
            close = getattr(tokens, "close", None)
            if close:
                close()
        if not stopper.hit:
            reason = "length" if count == most else "stop"
            rest = stopper.push(decoder.flush()) + stopper.flush()
            reason = "stop" if stopper.hit else reason
            if rest:
                yield Delta(rest, len(ids), count)
        yield Delta("", len(ids), count, "length" if reason == "length" else "stop")

    def generate(self, prompt: Prompt, config: GenerationConfig = DEFAULT) -> Completion:
        """The whole answer at once."""
        return Completion.of(list(self.stream(prompt, config)))

    async def generate_async(self, prompt: Prompt, config: GenerationConfig = DEFAULT) -> AsyncIterator[Delta]:
        """Like ``stream``, for an event loop. Closing the iterator stops the generation.

        The work is done by a thread; with ``isolated`` the thread only waits, so the loop is free throughout.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()
        stopped = threading.Event()

        def hand_over(item: Delta | BaseException | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, item)

        def work() -> None:
            try:
                for delta in self.stream(prompt, config, cancelled=stopped.is_set):
                    hand_over(delta)
                    if stopped.is_set():
                        return
                hand_over(None)
            # the consumer raises it: a thread has nobody to tell
            except Exception as error:  # noqa: BLE001
                hand_over(error)

        worker = loop.run_in_executor(None, work)
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            await asyncio.shield(worker)

    def generate_batch(self, prompts: Sequence[Prompt], config: GenerationConfig = DEFAULT) -> list[Completion]:
        """Answers in the order of ``prompts``, one after the other: each equals that of ``generate``.

        All prompts are checked before the first is answered.
        """
        for index, prompt in enumerate(prompts):
            try:
                self.prepare(prompt, config)
            except QwenOnnxError as error:
                error.add_note(f"prompt {index} of the batch")
                raise
        return [self.generate(prompt, config) for prompt in prompts]

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


def _sampling(config: GenerationConfig) -> SamplingOptions:
    return SamplingOptions(config.temperature, config.top_p, config.top_k, config.repetition_penalty, config.seed)


class StopStrings:
    """Cuts text at the first stop string, also one that spans tokens; the stop string itself is dropped."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """The part of the text so far that can no longer become a stop string."""
        if self.hit:
            return ""
        self._held += text
        found = [index for stop in self._stops if (index := self._held.find(stop)) >= 0]
        if found:
            self.hit = True
            return self._release(min(found))
        return self._release(len(self._held) - self._longest_prefix())

    def _longest_prefix(self) -> int:
        """Length of the longest tail that a stop string begins with."""
        tails = (len(stop[:size]) for stop in self._stops for size in range(1, len(stop)) if self._ends(stop[:size]))
        return max(tails, default=0)

    def _ends(self, prefix: str) -> bool:
        return self._held.endswith(prefix)

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def flush(self) -> str:
        """What was held back when no stop string came."""
        return "" if self.hit else self._release(len(self._held))
