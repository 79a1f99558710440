"""Answers of POST /v1/responses, whole and as events: https://platform.openai.com/docs/api-reference/responses-streaming"""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from qwen_onnx.errors import QwenOnnxError, RequestError
from qwen_onnx.runtime.processing.tool_calls import CallArguments, CallStart
from qwen_onnx.runtime.server.api.chat_response import call_id, sse
from qwen_onnx.runtime.server.api.events import End, Reasoning, Step
from qwen_onnx.runtime.server.api.protocol import Strict
from qwen_onnx.runtime.server.api.responses_request import ReasoningText, ResponseRequest

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(Strict):
    """The text of an answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[str]


class OutputMessage(Strict):
    """What the model says."""

    type: Literal["message"]
    id: str
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class OutputReasoning(Strict):
    """What the model thinks."""

    type: Literal["reasoning"]
    id: str
    status: Status
    summary: list[str]
    content: list[ReasoningText]


class OutputCall(Strict):
    """A call that the model asks for; ``arguments`` is JSON as text."""

    type: Literal["function_call"]
    id: str
    status: Status
    call_id: str
    name: str
    arguments: str


class InputDetails(Strict):
    """``cached_tokens`` were found in the prefix cache; writing to it costs nothing."""

    cached_tokens: int
    cache_write_tokens: Literal[0]


class OutputDetails(Strict):
    """``reasoning_tokens`` are those up to the end of the reasoning."""

    reasoning_tokens: int


class ResponseUsage(Strict):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Failure(Strict):
    """Why there is no answer."""

    code: Literal["server_error", "invalid_prompt"]
    message: str


class Incomplete(Strict):
    """Why the answer is cut."""

    reason: Literal["max_output_tokens"]


class ResponseBody(Strict):
    """A whole answer, beside what was asked."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    error: Failure | None
    incomplete_details: Incomplete | None
    model: str
    output: list[OutputMessage | OutputReasoning | OutputCall]
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str] | None
    parallel_tool_calls: bool
    previous_response_id: None
    store: Literal[False]
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: Literal["disabled"]
    background: Literal[False]


class ResponseAnswers:
    """Builds the body and the events of one answer, from the same steps."""

    def __init__(self, request: ResponseRequest) -> None:
        asked = request.model_dump(mode="json", by_alias=True, exclude_unset=True)
        echoed = ("instructions", "max_output_tokens", "metadata", "temperature", "top_p", "model")
        self._body: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            **{name: asked.get(name) for name in echoed},
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "text": {"format": (asked.get("text") or {}).get("format") or {"type": "text"}},
            "tool_choice": asked.get("tool_choice") or "auto",
            "tools": [{"parameters": None, "strict": None, **tool} for tool in asked.get("tools") or ()],
            "truncation": "disabled",
            "background": False,
        }
        self._number = 0
        # the item that grows
        self._open: dict[str, Any] | None = None

    def body(self) -> ResponseBody:
        """As it is now."""
        return ResponseBody.model_validate(self._body)

    def begin(self) -> list[str]:
        """The first events."""
        return [self._told("response.created"), self._told("response.in_progress")]

    def add(self, step: Step) -> list[str]:
        """The events of a step."""
        event = step.event
        if isinstance(event, End):
            return self._end(event)
        if isinstance(event, CallStart):
            call = {"type": "function_call", "call_id": call_id(), "name": event.name, "arguments": ""}
            return self._begin_item("fc", call)
        if isinstance(event, CallArguments):
            return self._grow("function_call_arguments", event.text)
        kind = "reasoning" if isinstance(event, Reasoning) else "message"
        events = [] if self._open and self._open["type"] == kind else self._begin_text(kind)
        return [*events, *self._grow("reasoning_text" if kind == "reasoning" else "output_text", event.text)]

    def failed(self, error: QwenOnnxError) -> list[str]:
        """The last event when the engine failed."""
        code = "invalid_prompt" if isinstance(error, RequestError) else "server_error"
        self._body |= {"status": "failed", "error": {"code": code, "message": error.what}}
        return [self._told("response.failed")]

    def _begin_text(self, kind: str) -> list[str]:
        if kind == "reasoning":
            item: dict[str, Any] = {"type": kind, "summary": [], "content": []}
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        else:
            item, part = {"type": kind, "role": "assistant", "content": []}, text_part("")
        events = self._begin_item("rs" if kind == "reasoning" else "msg", item)
        item = self._body["output"][-1]
        events.append(self._event("response.content_part.added", **self._place(), content_index=0, part=part))
        item["content"].append(part)
        return events

    def _begin_item(self, prefix: str, item: dict[str, Any]) -> list[str]:
        events = self._end_item("completed")
        self._open = {**item, "id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress"}
        self._body["output"].append(self._open)
        index = len(self._body["output"]) - 1
        return [*events, self._event("response.output_item.added", output_index=index, item=self._open)]

    def _place(self) -> dict[str, Any]:
        index = len(self._body["output"]) - 1
        return {"item_id": self._body["output"][index]["id"], "output_index": index}

    def _grow(self, kind: str, text: str) -> list[str]:
        item = self._body["output"][-1]
        place = self._place()
        if kind == "function_call_arguments":
            item["arguments"] += text
        else:
            item["content"][0]["text"] += text
            place["content_index"] = 0
        more: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
        return [self._event(f"response.{kind}.delta", **place, delta=text, **more)]

    def _end_item(self, status: Status) -> list[str]:
        item, self._open = self._open, None
        if item is None:
            return []
        place = self._place()
        item["status"] = status
        if item["type"] == "function_call":
            told = {**place, "name": item["name"], "arguments": item["arguments"]}
            events = [self._event("response.function_call_arguments.done", **told)]
        else:
            place["content_index"] = 0
            part = item["content"][0]
            more: dict[str, Any] = {"logprobs": []} if part["type"] == "output_text" else {}
            events = [
                self._event(f"response.{part['type']}.done", **place, text=part["text"], **more),
                self._event("response.content_part.done", **place, part=part),
            ]
        index = place["output_index"]
        return [*events, self._event("response.output_item.done", output_index=index, item=item)]

    def _end(self, end: End) -> list[str]:
        status: Status = "incomplete" if end.reason == "length" else "completed"
        # an answer without a word is a message all the same
        events = [] if self._body["output"] else self._begin_text("message")
        events += self._end_item(status)
        last = end.last
        self._body |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": {
                "input_tokens": last.prompt_tokens,
                "input_tokens_details": {"cached_tokens": last.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": last.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": end.reasoning_tokens},
                "total_tokens": last.prompt_tokens + last.completion_tokens,
            },
        }
        return [*events, self._told(f"response.{status}")]

    def _told(self, kind: str) -> str:
        return self._event(kind, response=self._body)

    def _event(self, kind: str, **fields: Any) -> str:
        number, self._number = self._number, self._number + 1
        return sse({"type": kind, "sequence_number": number, **fields}, kind)


def text_part(text: str) -> dict[str, Any]:
    """A part of a message."""
    return {"type": "output_text", "text": text, "annotations": []}
