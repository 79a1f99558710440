"""The part of OpenAI's chat completions API that this server speaks. What it cannot do, it refuses.

https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.generation import Delta, GenerationConfig

# fields that ask for nothing when they have this value, and that we cannot serve otherwise
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
}
# for the operator's own use; they do not change the answer
IGNORED = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})


class Strict(BaseModel):
    """Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(Strict):
    """A text part of a message; images and audio are refused by its type."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One message; parts are joined to one text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """For the chat template."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Strict):
    """``include_usage`` adds a last chunk with the token counts."""

    include_usage: bool = False


class ChatRequest(Strict):
    """Body of POST /v1/chat/completions."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = Field(default=None)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in NEUTRAL.items():
            if name in data and data[name] not in neutral:
                raise ValueError(f"{name} is not supported")
        return {key: value for key, value in data.items() if key not in NEUTRAL and key not in IGNORED}

    def config(self) -> GenerationConfig:
        """Our form of the request; an absent field takes the default of ``GenerationConfig``.

        Raises:
            RequestError: a value out of its range.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 4:
            raise RequestError(f"{len(stops)} stop strings, the most is 4", where="stop")
        asked = {
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
        }
        return GenerationConfig(**{k: v for k, v in asked.items() if v is not None}, stop=tuple(stops))  # type: ignore[arg-type]


class Answer:
    """Builds the bodies of one answer: the whole completion or its chunks."""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, deltas: list[Delta]) -> dict[str, Any]:
        """A ``chat.completion``."""
        text = "".join(delta.text for delta in deltas)
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": deltas[-1].finish_reason, "logprobs": None}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage(deltas[-1])}

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """A ``chat.completion.chunk``."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def last(self, delta: Delta) -> dict[str, Any]:
        """The chunk that carries the usage and no choice."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(delta)}


def usage(delta: Delta) -> dict[str, int]:
    """Token counts of an answer."""
    total = delta.prompt_tokens + delta.completion_tokens
    return {
        "prompt_tokens": delta.prompt_tokens,
        "completion_tokens": delta.completion_tokens,
        "total_tokens": total,
    }


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The shape in which the openai client expects an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
