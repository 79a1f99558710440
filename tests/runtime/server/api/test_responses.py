"""The Responses API by the openai client: events in their order, and the same answer whole."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.responses import ResponseFailedEvent, ResponseStreamEvent
from pydantic import TypeAdapter

from qwen_onnx.errors import WorkerDiedError
from qwen_onnx.runtime.processing.tool_calls import CallArguments, CallStart, Text
from qwen_onnx.runtime.server.api.events import End, Reasoning, Step
from qwen_onnx.runtime.server.api.responses import ResponseAnswers
from qwen_onnx.runtime.server.api.responses_request import ResponseRequest
from qwen_onnx.runtime.service.generation import Delta

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Köln", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
SILENT: Any = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
SCHEMA: Any = {"format": {"type": "json_schema", "name": "city", "schema": CITY}}


def ask(client: OpenAI, **changes: Any) -> Any:
    return client.responses.create(
        **{"model": "tiny", "input": "hello", "max_output_tokens": 20, "temperature": 0, **changes}
    )


def told(response: Any) -> list[Any]:
    """The output without what differs from one answer to the next."""
    items = [item.model_dump(exclude_none=True) for item in response.output]
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in items]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text": SCHEMA, "max_output_tokens": 200, **SILENT},
        {"tools": [WEATHER], "tool_choice": "required", "max_output_tokens": 400, **SILENT},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "weather"}, "max_output_tokens": 50, **SILENT},
    ],
)
def test_streamed_and_whole_answers_agree(qwen3: OpenAI, changes: dict[str, Any]) -> None:
    whole = ask(qwen3, **changes)
    events = list(ask(qwen3, **changes, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == f"response.{whole.status}"
    final = events[-1].response
    assert told(final) == told(whole)
    assert final.usage.total_tokens == whole.usage.total_tokens
    assert final.id == events[0].response.id
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == len(final.output)
    for index, item in enumerate(final.output):
        own = [event for event in events if getattr(event, "output_index", None) == index]
        pieces = "".join(event.delta for event in own if event.type.endswith(".delta"))
        assert pieces == (item.arguments if item.type == "function_call" else item.content[0].text)
        assert {event.item_id for event in own if hasattr(event, "item_id")} == {item.id}
        assert own[0].type == "response.output_item.added"
        assert own[-1].type == "response.output_item.done"


def test_the_client_parses_the_stream_strictly(qwen3: OpenAI) -> None:
    """The openai package has a class for each kind of event; theirs is strict about fields when told so."""
    raw = qwen3.responses.with_raw_response.create(
        model="tiny", input="x", tools=[WEATHER], tool_choice="required", max_output_tokens=300, stream=True, **SILENT
    )
    seen = set()
    for event in raw.parse():
        fields = type(event).model_fields
        assert {name for name, field in fields.items() if field.is_required()} <= event.model_fields_set
        assert event.type in str(fields["type"].annotation)
        seen.add(event.type)
    assert "response.function_call_arguments.delta" in seen
    assert "response.function_call_arguments.done" in seen


def test_an_answer_that_is_cut_says_so(qwen3: OpenAI) -> None:
    response = ask(qwen3, max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[-1].status == "incomplete"
    assert response.output_text == response.output[-1].content[0].text


def test_json_and_calls(qwen3: OpenAI) -> None:
    response = ask(qwen3, text=SCHEMA, max_output_tokens=400, **SILENT)
    assert json.loads(response.output_text)["city"] in ("Köln", "Oslo")
    named: Any = {"type": "function", "name": "weather"}
    called = ask(qwen3, tools=[WEATHER], tool_choice=named, max_output_tokens=400, **SILENT)
    assert called.status == "completed"
    [call] = called.output
    assert json.loads(call.arguments)["city"] in ("Köln", "Oslo")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    talk: Any = [{"role": "user", "content": "hello"}, *called.output, result]
    assert ask(qwen3, input=talk, tools=[WEATHER]).status in ("completed", "incomplete")


def test_reasoning_text_and_calls_are_items_in_their_order() -> None:
    """Of steps as a model that thinks gives them; the random one cannot be brought to it here."""
    answers = ResponseAnswers(ResponseRequest.model_validate({"model": "m", "input": "x"}))
    last = Delta("", 5, 9, "stop", 2)
    events: list[Any] = [Reasoning("h"), Reasoning("m"), Text("Hi"), CallStart(0, "f"), CallArguments(0, "{}")]
    events += [CallStart(1, "g"), CallArguments(1, '{"a"'), CallArguments(1, ": 1}"), End("tool_calls", last, 3)]
    lines = [*answers.begin(), *(line for event in events for line in answers.add(Step(event)))]
    kinds = [line.split("\n")[0].removeprefix("event: response.") for line in lines]
    text = ["output_item.added", "content_part.added"]
    call = ["output_item.added", "function_call_arguments.delta"]
    assert kinds == [
        *("created", "in_progress", *text, "reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done"),
        *("content_part.done", "output_item.done", *text, "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done", *call, "function_call_arguments.done", "output_item.done"),
        *(*call, "function_call_arguments.delta", "function_call_arguments.done", "output_item.done", "completed"),
    ]
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for line in lines:
        adapter.validate_json(line.split("data: ", 1)[1])
    body = answers.body()
    assert [item.type for item in body.output] == ["reasoning", "message", "function_call", "function_call"]
    assert body.usage is not None
    assert body.usage.output_tokens_details.reasoning_tokens == 3
    assert {item.status for item in body.output} == {"completed"}


def test_a_failure_is_the_last_event() -> None:
    answers = ResponseAnswers(ResponseRequest.model_validate({"model": "m", "input": "x"}))
    answers.add(Step(Text("Hi")))
    [line] = answers.failed(WorkerDiedError("the engine's process died"))
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    event = adapter.validate_json(line.split("data: ", 1)[1])
    assert isinstance(event, ResponseFailedEvent)
    assert event.response.error is not None
    assert (event.response.error.code, event.response.status) == ("server_error", "failed")


def test_conversations_give_the_prompt_of_a_chat(qwen3: OpenAI) -> None:
    talk: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "go on"},
    ]
    response = ask(qwen3, input=talk, instructions="Be brief.")
    plain: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "go on"},
    ]
    chat = qwen3.chat.completions.create(model="tiny", messages=plain, max_tokens=1)
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "z", "output": "x"}]}, "no earlier call 'z'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "'tiny' reads no pic"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "foo"}}}}, "Invalid type"),
    ],
)
def test_what_cannot_be_served_is_a_400_that_names_it(qwen3: OpenAI, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(openai.BadRequestError, match=expected):
        ask(qwen3, **changes)


def test_a_faulty_schema_is_named_by_its_own_field(qwen3: OpenAI) -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"type": "strange"}}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(qwen3, text={"format": form})
    assert caught.value.param == "text.format"
