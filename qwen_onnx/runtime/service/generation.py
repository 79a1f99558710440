"""What is asked of a model and what it answers: the records between the service and everything that faces people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen_onnx.errors import RequestError

FinishReason = Literal["stop", "length"]
Message = Mapping[str, Any]

RANGES: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, 2**31 - 1),
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.1, 10.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "seed": (0, 2**63 - 1),
    "logprobs": (0, 20),
}
OPTIONAL = ("seed", "logprobs")
MOST_STOP_STRINGS, MOST_STOP_CHARACTERS = 16, 256


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; top_k 0, min_p 0 and penalties 0 (repetition: 1) are off.

    Args:
        seed: the same answer to the same prompt, whatever else runs; None draws anew.
        logit_bias: token id to what is added to its logit, -100 to 100.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(Sampling):
    """How to answer.

    Args:
        max_new_tokens: the most that the answer has.
        stop: the answer ends before the first of these strings; at most 16 of at most 256 characters.
        logprobs: None is off; else how many alternatives are told beside each chosen token, 0 to 20.
        grammar: of llguidance, as JSON or Lark text: the answer is a word of it.

    Raises:
        RequestError: a value out of its range, naming field and range.
    """

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if name in OPTIONAL and value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            whole = isinstance(value, int) or isinstance(least, float)
            if not number or not whole or not least <= value <= most:
                kind = "a number" if isinstance(least, float) else "a whole number"
                raise RequestError(f"{name} is {value!r}, not {kind} from {least} to {most}", where=name)
        if self.top_p == 0:
            raise RequestError("top_p is 0: no token is left", where="top_p", hint="use temperature 0 for greedy")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError("stop holds an empty string or no strings", where="stop")
        if len(self.stop) > MOST_STOP_STRINGS:
            raise RequestError(f"{len(self.stop)} stop strings, the most is {MOST_STOP_STRINGS}", where="stop")
        longest = max(map(len, self.stop), default=0)
        if longest > MOST_STOP_CHARACTERS:
            raise RequestError(
                f"a stop string has {longest} characters, the most is {MOST_STOP_CHARACTERS}", where="stop"
            )
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or not -100 <= bias <= 100:
                raise RequestError(f"logit_bias of {token!r} is {bias!r}, not from -100 to 100", where="logit_bias")


DEFAULT = GenerationConfig()


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation and what its template is told beside it.

    Args:
        messages: role and content, and whatever else the template reads (tool_calls, reasoning_content).
        tools: declarations in OpenAI's form, ``{"type": "function", "function": {...}}``.
        thinking: None leaves it to the template; else the template's ``enable_thinking``.
        schema: JSON schema that the answer is held to; the template is not told, but its characters are input too.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    thinking: bool | None = None
    schema: Mapping[str, Any] | None = None


# text to continue, token ids to continue, or a conversation to answer
Prompt = str | Sequence[int] | Sequence[Message] | ChatPrompt


@dataclass(frozen=True)
class TokenLogprob:
    """A token, as text and as bytes of UTF-8, and its natural log probability before temperature and truncation."""

    token: str
    utf8: bytes
    logprob: float
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
