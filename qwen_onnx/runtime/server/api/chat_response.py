"""Answers of POST /v1/chat/completions, whole and in chunks."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any, Literal

from qwen_onnx.runtime.processing.tool_calls import CallArguments, CallStart
from qwen_onnx.runtime.server.api.events import Answer, End, Finish, Reasoning, Step
from qwen_onnx.runtime.server.api.protocol import Strict, Usage
from qwen_onnx.runtime.service.generation import Delta, TokenLogprob

# after the last chunk of a stream
DONE = "data: [DONE]\n\n"
# JSON has no infinity
LEAST_LOGPROB = -9999.0


class TopLogprob(Strict):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TopLogprob):
    """A token that was chosen, and the most likely ones beside it."""

    top_logprobs: list[TopLogprob]


class Logprobs(Strict):
    """Of the tokens of an answer, tags of reasoning and calls included."""

    content: list[ChosenLogprob]
    refusal: None = None


class CalledFunction(Strict):
    """``arguments`` is JSON as text; it is cut when the answer was cut for its length."""

    name: str
    arguments: str


class MadeCall(Strict):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Strict):
    """``content`` is null when there are calls only."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[MadeCall] | None = None


class Choice(Strict):
    """One of n answers."""

    index: int
    message: AnswerMessage
    finish_reason: Finish
    logprobs: Logprobs | None


class ChatCompletion(Strict):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[Choice]
    usage: Usage


class ChatAnswers:
    """Builds the bodies of one request's answers.

    Args:
        count: answers; with_logprobs, with_usage: whether they were asked for.
        audio: tokens of the prompt that stand for sounds.
    """

    def __init__(
        self, model: str, fingerprint: str, count: int, *, with_logprobs: bool, with_usage: bool, audio: int = 0
    ) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._count, self._with_logprobs, self._with_usage, self._audio = count, with_logprobs, with_usage, audio

    def whole(self, answers: list[Answer]) -> bytes:
        """A ``chat.completion``, as JSON."""
        body = ChatCompletion.model_validate(
            {
                **self._head,
                "object": "chat.completion",
                "choices": [self._choice(index, answer) for index, answer in enumerate(answers)],
                "usage": usage({index: answer.end for index, answer in enumerate(answers) if answer.end}, self._audio),
            }
        )
        return body.model_dump_json(exclude_unset=True).encode()

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["content"] = answer.content or None
            message["tool_calls"] = [
                {"id": call_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in answer.calls
            ]
        reason = answer.end.reason if answer.end else "stop"
        return {"index": index, "message": message, "finish_reason": reason, "logprobs": self._logprobs(answer)}

    def _logprobs(self, holder: Answer | Step) -> dict[str, Any] | None:
        if not self._with_logprobs or (isinstance(holder, Step) and not holder.logprobs):
            return None
        return {"content": [{**told(entry), "top_logprobs": list(map(told, entry.top))} for entry in holder.logprobs]}

    def roles(self) -> list[str]:
        """The first chunk of each answer."""
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self._count)]

    def chunk(self, index: int, step: Step) -> str:
        """The chunk of a step."""
        event, delta, reason = step.event, dict[str, Any](), None
        if isinstance(event, Reasoning):
            delta = {"reasoning_content": event.text}
        elif isinstance(event, CallStart):
            function = {"name": event.name, "arguments": ""}
            call = {"index": event.index, "id": call_id(), "type": "function", "function": function}
            delta = {"tool_calls": [call]}
        elif isinstance(event, CallArguments):
            delta = {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
        elif isinstance(event, End):
            reason = event.reason
        else:
            delta = {"content": event.text}
        return self._chunk(index, delta, reason, self._logprobs(step))

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: Finish | None = None, logprobs: dict[str, Any] | None = None
    ) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        return self._event([choice], {"usage": None} if self._with_usage else {})

    def usage_chunks(self, ends: dict[int, End]) -> list[str]:
        """The chunk that carries the usage and no choice, when it was asked for."""
        told = usage(ends, self._audio).model_dump(exclude_unset=True)
        return [self._event([], {"usage": told})] if self._with_usage else []

    def _event(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> str:
        return sse({**self._head, "object": "chat.completion.chunk", "choices": choices, **more})


def usage(ends: dict[int, End], audio: int = 0) -> Usage:
    """Of n answers to one prompt, of which ``audio`` tokens stand for sounds."""
    last: dict[int, Delta] = {index: end.last for index, end in sorted(ends.items())}
    return Usage.of(last, len(last), sum(end.reasoning_tokens for end in ends.values()), audio)


def told(entry: TokenLogprob) -> dict[str, Any]:
    """A log probability in OpenAI's form."""
    return {"token": entry.token, "logprob": finite(entry.logprob), "bytes": list(entry.utf8)}


def finite(logprob: float | None) -> float | None:
    """A log probability that JSON can tell; None stays None."""
    return None if logprob is None else max(logprob, LEAST_LOGPROB)


def call_id() -> str:
    """Of a call; results refer to it."""
    return f"call_{uuid.uuid4().hex[:24]}"


def sse(body: dict[str, Any], event: str | None = None) -> str:
    """A server-sent event."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(body)}\n\n"
