"""The Responses API by the openai client: events in their order, and the same answer whole."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai import OpenAI

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


def test_reasoning_is_an_item_of_its_own(qwen3: OpenAI) -> None:
    """A chat of the same prompt and tokens tells how many tokens it had; all that the model says is reasoning here."""
    events = list(ask(qwen3, stream=True, text=SCHEMA, temperature=1.5, max_output_tokens=300))
    kinds = {event.type for event in events}
    items = [item.type for item in events[-1].response.output]
    assert set(items) <= {"reasoning", "message"}
    assert ("response.reasoning_text.delta" in kinds) == ("reasoning" in items)


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
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "foo"}}}}, "Invalid type"),
    ],
)
def test_what_cannot_be_served_is_a_400_that_names_it(qwen3: OpenAI, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(openai.BadRequestError, match=expected):
        ask(qwen3, **changes)
