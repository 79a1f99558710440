"""A conversation with a model: its messages and settings, how it is saved, what happens when the context is full."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Base64Bytes, ValidationError

from qwen_onnx.bounded import read_bytes
from qwen_onnx.errors import ConfigError, PromptTooLongError, RequestError, TemplateError
from qwen_onnx.files import write_private
from qwen_onnx.records import Record
from qwen_onnx.runtime.processing.data_uri import MOST_BYTES
from qwen_onnx.runtime.processing.reasoning import Kind, ThinkingSplitter, is_open
from qwen_onnx.runtime.processing.template import Message
from qwen_onnx.runtime.service.generation import (
    PARAMETERS,
    Attached,
    AttachedVideo,
    ChatPrompt,
    Delta,
    GenerationConfig,
)
from qwen_onnx.runtime.service.qwen import QwenService

# what /set knows; the rest of a configuration are texts and tables, not numbers
SETTINGS = tuple(name for name in PARAMETERS if name != "logprobs")
# an answer that is cut after some words helps nobody: so much of the context is kept free for it
ROOM = 0.25
IMAGE, AUDIO, VIDEO = "/image", "/audio", "/video"
# what of a model is shown with a question, by the field of the message that has it
FIELDS = {IMAGE: "pictures", AUDIO: "sounds", VIDEO: "videos"}


class SavedMessage(Record):
    """One message.

    Attributes:
        stopped: the user stopped this answer, the text is what had come.
        pictures, sounds, videos: that stand before a question's text, as base64 of their files.
    """

    role: Literal["user", "assistant"]
    content: str
    reasoning_content: str | None = None
    stopped: bool = False
    pictures: tuple[Base64Bytes, ...] = ()
    sounds: tuple[Base64Bytes, ...] = ()
    videos: tuple[Base64Bytes, ...] = ()

    def plain(self) -> Message:
        """For the chat template, which decides itself what to do with earlier reasoning."""
        parts: list[dict[str, str]] = [{"type": "image"} for _ in self.pictures]
        # templates look for one or the other key
        parts += [{"type": "audio", "audio_url": ""} for _ in self.sounds]
        parts += [{"type": "video"} for _ in self.videos]
        if parts:
            return {"role": self.role, "content": [*parts, {"type": "text", "text": self.content}]}
        return self.model_dump(include={"role", "content", "reasoning_content"}, exclude_none=True)


def _alternate(messages: list[SavedMessage]) -> list[SavedMessage]:
    for index, message in enumerate(messages):
        expected = "assistant" if index % 2 else "user"
        if message.role != expected:
            raise ValueError(f"message {index} is of the {message.role}, expected the {expected}")
    if len(messages) % 2:
        raise ValueError("the last question has no answer")
    return messages


class SavedChat(Record):
    """The file that /save writes."""

    format: Literal["qwen-onnx-chat/1"]
    model: str
    system: str | None
    thinking: bool | None
    settings: dict[str, int | float | None]
    messages: Annotated[list[SavedMessage], AfterValidator(_alternate)]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an answer took. Seconds; ``tokens_per_second`` is of decoding alone, None for fewer than two tokens."""

    last: Delta
    stopped: bool
    first_token_seconds: float | None
    tokens_per_second: float | None


class Conversation:
    """Messages and settings.

    Args:
        service: answers.
        config: how to answer, until ``set`` changes it.
        model: name of the model, for files.
        system: the system message.
    """

    def __init__(
        self, service: QwenService, config: GenerationConfig, *, model: str, system: str | None = None
    ) -> None:
        self.service, self.config, self.model, self.system = service, config, model, system
        self.thinking: bool | None = None
        self.messages: list[SavedMessage] = []
        self.attached: list[tuple[str, bytes]] = []

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.service.engine.shape.context_length

    def prompt(self) -> ChatPrompt:
        """All that is said so far."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        pictures = [Attached(content, IMAGE) for message in self.messages for content in message.pictures]
        sounds = [Attached(content, AUDIO) for message in self.messages for content in message.sounds]
        videos = [AttachedVideo(content, VIDEO) for message in self.messages for content in message.videos]
        plain = [message.plain() for message in self.messages]
        return ChatPrompt([*system, *plain], thinking=self.thinking, pictures=pictures, sounds=sounds, videos=videos)

    def attach(self, path: Path, command: str = IMAGE) -> None:
        """Show the model a picture with the next question, a video with ``VIDEO``, or play it a sound with ``AUDIO``.

        Raises:
            RequestError: the model does not take one, or the file is not whole.
        """
        if command == IMAGE and not self.service.sees:
            raise RequestError(f"the model {self.model} reads no pictures", where=IMAGE)
        if command == VIDEO and not self.service.sees:
            raise RequestError(f"the model {self.model} watches no videos", where=VIDEO)
        if command == AUDIO and not self.service.hears:
            raise RequestError(f"the model {self.model} hears no sounds", where=AUDIO)
        content = read_bytes(path.resolve(), most_bytes=MOST_BYTES, error=RequestError)
        kind = AttachedVideo if command == VIDEO else Attached
        self.service.check(kind(content, str(path)))
        self.attached.append((command, content))

    def ask(self, text: str) -> None:
        """Add a question, with what was attached."""
        media = {
            field: tuple(content for kind, content in self.attached if kind == command)
            for command, field in FIELDS.items()
        }
        # validation would decode them from base64
        asked = SavedMessage(role="user", content=text).model_copy(update=media)
        self.messages.append(asked)
        self.attached.clear()

    def forget_answer(self) -> None:
        """Take the last answer back, so that its question can be answered anew.

        Raises:
            RequestError: there is none.
        """
        if not self.messages:
            raise RequestError("there is no answer yet", where="/regenerate")
        self.messages.pop()

    def fit(self) -> tuple[int, int]:
        """Drop the oldest questions and answers until the rest leaves room for an answer.

        Returns:
            Messages dropped, tokens that the prompt had before.

        Raises:
            PromptTooLongError: the last question alone is too long.
        """
        wanted = self.context_length - min(self.config.max_new_tokens, int(self.context_length * ROOM))
        whole = self.messages
        try:
            before = size = self._tokens()
            while size > wanted and len(self.messages) > 1:
                self.messages = self.messages[2:]
                size = self._tokens()
            self.service.prepare(self.prompt(), self.config)
        except PromptTooLongError:
            self.messages = whole
            raise
        return len(whole) - len(self.messages), before

    def _tokens(self) -> int:
        try:
            prompt = self.prompt()
            if prompt.pictures or prompt.sounds or prompt.videos:
                # what they take is known once they are opened
                return len(self.service.prepare(prompt, self.config))
            return len(self.service.encode_chat(prompt))
        except PromptTooLongError:
            # longer than is worth counting: at least a token more than fits
            if len(self.messages) == 1:
                raise
            return self.context_length + 1

    def answer(self, show: Callable[[Kind, str], None], stopped: Callable[[], bool]) -> Outcome:
        """Answer the last question piece by piece and add the answer, also one that is stopped.

        Raises:
            QwenOnnxError: the question is refused or the engine failed; the question is taken back.
        """
        said: dict[Kind, str] = {"reasoning": "", "content": ""}
        begin, first, last = time.perf_counter(), None, None
        finished = False

        def pass_on(pieces: list[tuple[Kind, str]]) -> None:
            for kind, text in pieces:
                said[kind] += text
                show(kind, text)

        try:
            prompt = self.service.prepare(self.prompt(), self.config)
            splitter = ThinkingSplitter(is_open(self.service.tokenizer.tail(prompt)))
            for last in self.service.stream(prompt, self.config, cancelled=stopped):
                first = first or time.perf_counter()
                pass_on(splitter.push(last.text))
                if stopped():
                    break
            pass_on(splitter.flush())
            finished = True
        finally:
            if not finished:
                self.messages.pop()
        # an answer that was at its end already is whole
        cut = stopped() and not (last and last.finish_reason == "length")
        self.messages.append(
            SavedMessage(
                role="assistant",
                content=said["content"],
                reasoning_content=said["reasoning"] or None,
                stopped=cut,
            )
        )
        last = last or Delta("", 0, 0)
        decoding = time.perf_counter() - (first or begin)
        speed = (last.completion_tokens - 1) / decoding if last.completion_tokens > 1 and decoding > 0 else None
        return Outcome(last, cut, first and first - begin, speed)

    def set(self, name: str, value: str) -> None:
        """Change one setting.

        Raises:
            RequestError: no such setting, or a value out of its range.
        """
        if name not in SETTINGS:
            raise RequestError(f"there is no setting {name!r}; there are {', '.join(SETTINGS)}", where="/set")
        number: int | float | None = None
        if not (PARAMETERS[name].default is None and value == "none"):
            try:
                number = int(value) if PARAMETERS[name].whole else float(value)
            except ValueError as error:
                raise RequestError(f"{name} is {value!r}, not a number", where=name) from error
        self.config = dataclasses.replace(self.config, **{name: number})  # type: ignore[arg-type]

    def set_thinking(self, on: bool) -> None:
        """Ask the template to have the model think, or not.

        Raises:
            TemplateError: the template makes no difference between the two.
        """
        trial = [{"role": "user", "content": "?"}]
        yes, no = (self.service.format_chat(ChatPrompt(trial, thinking=value)) for value in (True, False))
        if yes == no:
            raise TemplateError(
                f"{self.model}'s chat template has no enable_thinking: it cannot be switched", where="/think"
            )
        self.thinking = on

    def save(self, path: Path) -> None:
        """Write all to a file, by one rename, readable by its owner only.

        Raises:
            ConfigError: the file cannot be written.
        """
        saved = SavedChat(
            format="qwen-onnx-chat/1",
            model=self.model,
            system=self.system,
            thinking=self.thinking,
            settings={name: getattr(self.config, name) for name in SETTINGS},
            messages=self.messages,
        )
        try:
            write_private(path, saved.model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise ConfigError([f"{path}: cannot be written: {error.strerror}"]) from error

    def load(self, path: Path) -> str | None:
        """Take messages and settings from a file that ``save`` wrote; nothing changes when it is faulty.

        Returns:
            The model that the chat was held with, when it is another.

        Raises:
            ConfigError: the file cannot be read or is no saved chat, all faults at once.
        """
        try:
            saved = SavedChat.model_validate_json(path.read_bytes())
            unknown = sorted(saved.settings.keys() - set(SETTINGS))
            if unknown:
                raise ConfigError([f"{path}: settings.{name}: unknown key" for name in unknown])
            config = dataclasses.replace(self.config, **saved.settings)  # type: ignore[arg-type]
        except OSError as error:
            raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
        except RequestError as error:
            raise ConfigError([f"{path}: settings.{error.where}: {error.what}"]) from error
        except ValidationError as error:
            faults = [(".".join(map(str, item["loc"])), item["msg"]) for item in error.errors(include_url=False)]
            raise ConfigError([f"{path}: {place or '(top level)'}: {words}" for place, words in faults]) from error
        if saved.thinking is not None:
            self.set_thinking(saved.thinking)
        self.config, self.system, self.messages = config, saved.system, list(saved.messages)
        self.thinking = saved.thinking
        return saved.model if saved.model != self.model else None
