"""What is asked of a model and what it answers: the records between the service and everything that faces people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.engines.sampling import MOST_BIAS, Sampling, parameter, parameters
from qwen_onnx.runtime.processing.template import Message

FinishReason = Literal["stop", "length"]
MOST_STOP_STRINGS, MOST_STOP_CHARACTERS = 16, 256
MOST_BIASES = 1024


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(Sampling):
    """How to answer.

    Args:
        max_new_tokens: the most that the answer has.
        stop: the answer ends before the first of these strings; at most 16 of at most 256 characters.
        logprobs: None is off; else how many alternatives are told beside each chosen token, 0 to 20.
        echo: the answer begins with the prompt, and ``logprobs`` tell of its tokens too; ``max_new_tokens`` may be 0.
        grammar: of llguidance, as JSON or Lark text: the answer is a word of it.
        adapter: name of an adapter that the service was given; None: the model alone.

    Raises:
        RequestError: a value out of its range, naming field and range.
    """

    max_new_tokens: int = parameter(256, 1, 2**31 - 1, "Most tokens of the answer, reasoning included.")
    stop: tuple[str, ...] = ()
    logprobs: int | None = parameter(None, 0, 20, "Alternatives told beside each token.")
    grammar: str | None = None
    echo: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        for name, one in PARAMETERS.items():
            if not (self.echo and name == "max_new_tokens" and self.max_new_tokens == 0):
                one.check(name, getattr(self, name))
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError("stop holds an empty string or no strings", where="stop")
        if len(self.stop) > MOST_STOP_STRINGS:
            raise RequestError(f"{len(self.stop)} stop strings, the most is {MOST_STOP_STRINGS}", where="stop")
        longest = max(map(len, self.stop), default=0)
        if longest > MOST_STOP_CHARACTERS:
            raise RequestError(
                f"a stop string has {longest} characters, the most is {MOST_STOP_CHARACTERS}", where="stop"
            )
        if len(self.logit_bias) > MOST_BIASES:
            raise RequestError(
                f"logit_bias has {len(self.logit_bias)} entries, the most is {MOST_BIASES}", where="logit_bias"
            )
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or not -MOST_BIAS <= bias <= MOST_BIAS:
                told = f"logit_bias of {token!r} is {bias!r}, not from -{MOST_BIAS} to {MOST_BIAS}"
                raise RequestError(told, where="logit_bias")


# all numbers that a request may give
PARAMETERS = parameters(GenerationConfig)
DEFAULT = GenerationConfig()


@dataclass(frozen=True)
class Attached:
    """A picture or a sound as a client sent it: the bytes of a file, and where the request has it, for messages.

    Args:
        form: the format that a request says of a sound; None: whatever it is.
    """

    content: bytes
    where: str
    form: str | None = None


@dataclass(frozen=True)
class AttachedVideo:
    """A video as a client sent it, and where the request has it.

    Args:
        content: the bytes of an animated GIF, APNG or WebP; or those of a picture for each frame, in their order.
        fps: frames a second, of pictures alone; None: 2. A file says it itself.
    """

    content: bytes | tuple[bytes, ...]
    where: str
    fps: float | None = None


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation and what its template is told beside it.

    Args:
        messages: role and content, and whatever else the template reads (tool_calls, reasoning_content).
        tools: declarations in OpenAI's form, ``{"type": "function", "function": {...}}``.
        thinking: None leaves it to the template; else the template's ``enable_thinking``.
        schema: JSON schema that the answer is held to; the template is not told, but its characters are input too.
        pictures, sounds, videos: in the order of the parts ``{"type": "image"}``, ``{"type": "audio"}`` and
            ``{"type": "video"}`` of the messages.
        prefill: how the answer begins, of this program's own words: the model goes on behind it.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    thinking: bool | None = None
    schema: Mapping[str, Any] | None = None
    pictures: Sequence[Attached] = ()
    sounds: Sequence[Attached] = ()
    videos: Sequence[AttachedVideo] = ()
    prefill: str = ""


# text to continue, token ids to continue, or a conversation to answer
Prompt = str | Sequence[int] | Sequence[Message] | ChatPrompt


@dataclass(frozen=True)
class TokenLogprob:
    """A token, as text and as bytes of UTF-8, and its natural log probability before temperature and truncation.

    ``logprob`` is None for the first token of a prompt, before which nothing stands.
    """

    token: str
    utf8: bytes
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Delta:
    """A piece of the answer. The last one alone has a ``finish_reason``; counts are those so far.

    ``cached_tokens`` is how many of the prompt's tokens were found in the prefix cache; it is no part of the answer,
    and comparisons leave it out. ``logprobs`` are those of the
    tokens that this piece became certain with: a piece of text may need several, a token may bring no text yet.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason | None = None
    cached_tokens: int = field(default=0, compare=False)
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = field(default=0, compare=False)
    logprobs: tuple[TokenLogprob, ...] = ()

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Completion:
        """The pieces of one answer, joined."""
        last = deltas[-1]
        return cls(
            "".join(delta.text for delta in deltas),
            last.finish_reason or "stop",
            last.prompt_tokens,
            last.completion_tokens,
            last.cached_tokens,
            tuple(entry for delta in deltas for entry in delta.logprobs),
        )
