"""Chat completions by the openai client: choices, limits, log probabilities, JSON, tools, thinking."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from qwen_onnx.runtime import QwenService

HELLO: Any = [{"role": "user", "content": "hello"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Köln", "Oslo"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS: Any = [WEATHER, NOW]
# a random model that may think does not come to an end
SILENT: Any = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}


def schema_of(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


# llguidance accepts it, and gives up after some dozens of a's
DEMANDING: Any = {"type": "object", "properties": {"a": {"pattern": "^(a{1,1000}){1,1000}$", "type": "string"}}}
DEMANDING |= {"required": ["a"], "additionalProperties": False}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def ask(client: OpenAI, **changes: Any) -> Any:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0, **changes}
    return client.chat.completions.create(**body)


def folded(chunks: Any, count: int = 1) -> list[dict[str, Any]]:
    """The choices of a stream, put together as clients do it; checks the rules of the deltas on the way."""
    answers: list[dict[str, Any]] = [
        {"content": "", "reasoning": "", "calls": [], "reason": None, "logprobs": []} for _ in range(count)
    ]
    roles = [0] * count
    for chunk in chunks:
        for choice in chunk.choices:
            answer, delta = answers[choice.index], choice.delta
            assert answer["reason"] is None, "a piece after the end"
            roles[choice.index] += delta.role == "assistant"
            answer["content"] += delta.content or ""
            answer["reasoning"] += getattr(delta, "reasoning_content", None) or ""
            answer["logprobs"] += choice.logprobs.content if choice.logprobs else []
            for call in delta.tool_calls or ():
                if call.index == len(answer["calls"]):
                    assert call.id
                    assert call.type == "function"
                    assert call.function.arguments == ""
                    answer["calls"].append([call.function.name, ""])
                else:
                    assert call.index == len(answer["calls"]) - 1
                    assert call.id is None
                    assert call.function.name is None
                    answer["calls"][call.index][1] += call.function.arguments
            answer["reason"] = choice.finish_reason
    assert roles == [1] * count
    return answers


def of(choice: Any) -> dict[str, Any]:
    """A choice of a whole answer in the form of ``folded``."""
    calls = [[call.function.name, call.function.arguments] for call in choice.message.tool_calls or ()]
    return {
        "content": choice.message.content or "",
        "reasoning": getattr(choice.message, "reasoning_content", None) or "",
        "calls": calls,
        "reason": choice.finish_reason,
        "logprobs": choice.logprobs.content if choice.logprobs else [],
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n": 2},
        {"n": 3, "temperature": 1, "seed": 5},
        {"logprobs": True, "top_logprobs": 2},
        {"stop": ["e"], "logprobs": True, "max_tokens": 60},
        {"tools": TOOLS, "tool_choice": "required", "max_tokens": 300, **SILENT},
        {"tools": TOOLS, "tool_choice": "required", "max_tokens": 50},
        {"tools": TOOLS},
        {
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}},
            "max_tokens": 200,
            **SILENT,
        },
        {"messages": [{"role": "user", "content": "x /no_think"}], "extra_body": {"min_p": 0.5, "top_k": 7}},
    ],
)
def test_streamed_and_whole_answers_agree(qwen3: OpenAI, changes: dict[str, Any]) -> None:
    """A seed makes the engine run an answer alone, so that rounding is the same."""
    changes = {"seed": 1, **changes}
    whole = ask(qwen3, **changes)
    stream = list(ask(qwen3, **changes, stream=True, stream_options={"include_usage": True}))
    count = changes.get("n", 1)
    assert folded(stream, count) == [of(choice) for choice in whole.choices]
    assert all(chunk.usage is None for chunk in stream[:-1])
    assert stream[-1].choices == []
    counted = stream[-1].usage.model_dump()
    expected = whole.usage.model_dump()
    cached = [usage.pop("prompt_tokens_details")["cached_tokens"] for usage in (counted, expected)]
    assert all(0 <= count <= whole.usage.prompt_tokens for count in cached)
    assert counted == expected
    assert {chunk.system_fingerprint for chunk in stream} == {whole.system_fingerprint}


def test_a_repeated_prompt_is_found_in_the_cache(qwen3: OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "A long system prompt. " * 8}, *HELLO]
    ask(qwen3, messages=messages)
    assert ask(qwen3, messages=messages).usage.prompt_tokens_details.cached_tokens > 100


def test_choices_have_their_own_seeds(qwen3: OpenAI) -> None:
    several = ask(qwen3, n=3, temperature=1.5, seed=40)
    texts = [choice.message.content for choice in several.choices]
    alone = [ask(qwen3, temperature=1.5, seed=40 + index).choices[0].message.content for index in range(3)]
    assert texts == alone
    assert len(set(texts)) == 3


def test_logprobs_are_of_the_answer(qwen3: OpenAI) -> None:
    choice = ask(qwen3, logprobs=True, top_logprobs=3).choices[0]
    assert len(choice.logprobs.content) == 12
    assert (
        b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode(errors="replace")
        == choice.message.content
    )
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0


def test_logit_bias_and_penalties_choose(qwen3: OpenAI) -> None:
    first = ask(qwen3, max_tokens=1, logprobs=True).choices[0]
    token = ord("Z") - ord("!") + 2
    forced = ask(qwen3, logit_bias={str(token): 100}, max_tokens=4).choices[0].message.content
    assert forced == "ZZZZ"
    assert first.message.content != "Z"
    frequent = ask(qwen3, logit_bias={str(token): 3}, frequency_penalty=2, presence_penalty=2, max_tokens=8)
    assert len(set(frequent.choices[0].message.content)) > 1


def test_json_follows_its_schema(qwen3: OpenAI) -> None:
    for seed in range(3):
        choice = ask(qwen3, **SILENT, **schema_of(CITY), temperature=1.5, seed=seed, max_tokens=400).choices[0]
        assert choice.finish_reason == "stop"
        answer = json.loads(choice.message.content)
        assert answer["city"] in ("Köln", "Oslo")
        assert answer["days"] in (1, 2)
    cut = ask(qwen3, **SILENT, **schema_of(CITY), max_tokens=5).choices[0]
    assert cut.finish_reason == "length"
    some = ask(qwen3, **SILENT, response_format={"type": "json_object"}, seed=3, temperature=1, max_tokens=20)
    assert some.choices[0].message.content.startswith("{")


def test_required_named_and_single_calls(qwen3: OpenAI) -> None:
    common: dict[str, Any] = {"tools": TOOLS, **SILENT, "max_tokens": 900, "temperature": 1.2}
    # the bias brings the random model to its end, after some calls
    common["logit_bias"] = {"1": 3}
    several = 0
    for seed in range(4):
        choice = ask(qwen3, **common, tool_choice="required", seed=seed).choices[0]
        assert choice.finish_reason == "tool_calls"
        several += len(choice.message.tool_calls) > 1
        for call in choice.message.tool_calls:
            given = json.loads(call.function.arguments)
            assert set(given) == ({"city", "days"} if call.function.name == "weather" else set())
        assert len({call.id for call in choice.message.tool_calls}) == len(choice.message.tool_calls)
        named: Any = {"type": "function", "function": {"name": "weather"}}
        choice = ask(qwen3, **common, tool_choice=named, seed=seed).choices[0]
        assert [call.function.name for call in choice.message.tool_calls] == ["weather"]
        one = ask(qwen3, **common, tool_choice="required", parallel_tool_calls=False, seed=seed).choices[0]
        assert len(one.message.tool_calls) == 1
    assert several
    assert ask(qwen3, tools=TOOLS, tool_choice="none").choices[0].message.tool_calls is None


def test_a_call_that_begins_is_well_formed(qwen3: OpenAI) -> None:
    """With tool_choice auto; the bias makes the random model begin one."""
    choice = ask(qwen3, tools=TOOLS, logit_bias={"258": 40}, parallel_tool_calls=False, max_tokens=400).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert [json.loads(call.function.arguments) is not None for call in choice.message.tool_calls] == [True]


def test_an_answer_and_its_calls_can_be_sent_back(qwen3: OpenAI) -> None:
    first = ask(qwen3, **SILENT, tools=TOOLS, tool_choice="required", max_tokens=600).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in first.tool_calls]
    assert ask(qwen3, tools=TOOLS, messages=[*HELLO, first, *results]).choices[0].finish_reason


def test_the_prompt_is_what_the_template_makes_of_it(qwen3: OpenAI, qwen3_service: QwenService) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "now", "arguments": '{"x": "ü"}'}}
    messages: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "a", "content": "noon"},
    ]
    plain = [
        {"role": "system", "content": "Be brief."},
        *HELLO,
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [{**call, "function": {"name": "now", "arguments": {"x": "ü"}}}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "noon"},
    ]
    rendered = qwen3_service.format_chat(plain)
    assert '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "now", "arguments": {"x": "ü"}}\n</tool_call>' in rendered
    assert ask(qwen3, messages=messages).usage.prompt_tokens == len(qwen3_service.encode_chat(plain))
    later: Any = [*messages, {"role": "user", "content": "and now?"}]
    assert "hm" not in qwen3_service.format_chat([*plain, {"role": "user", "content": "and now?"}])
    assert ask(qwen3, messages=later).usage.prompt_tokens > 0


def test_thinking_is_apart(qwen3: OpenAI) -> None:
    """The bias makes the random model think, and stop thinking, at once."""
    choice = ask(qwen3, logit_bias={"260": 50}, max_tokens=30, seed=1).choices[0]
    assert choice.message.content == ""
    assert "<think>" in choice.message.reasoning_content
    answer = ask(qwen3, **schema_of(CITY), logit_bias={"260": 60, "261": 55}, max_tokens=400)
    assert json.loads(answer.choices[0].message.content)["city"]
    silent = ask(qwen3, **schema_of(CITY), **SILENT, logit_bias={"260": 60}, max_tokens=400)
    assert json.loads(silent.choices[0].message.content)["city"]
    assert not getattr(silent.choices[0].message, "reasoning_content", None)
    assert silent.usage.prompt_tokens > answer.usage.prompt_tokens
    assert silent.usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n": 9}, "n"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"logit_bias": {"99999": 1}}, "99999"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"store": True}, "store"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"extra_body": {"temperature": "0"}}, "temperature"),
        ({"extra_body": {"chat_template_kwargs": {"other": 1}}}, "other"),
        (schema_of({"type": "foo"}), "Invalid type: foo"),
        (schema_of({"not": {}}), "Unimplemented keys"),
        (schema_of(nested(100)), "64 levels"),
        (
            {**schema_of(DEMANDING), **SILENT, "logit_bias": {"66": 100}, "max_tokens": 400},
            "grammar is more than llguidance can follow",
        ),
        ({"tool_choice": "required"}, "no tools"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "z"}}}, "'z'"),
        ({"tools": [NOW, NOW]}, "two functions"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "not object"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools"),
        ({"messages": [*HELLO, {"role": "tool", "tool_call_id": "q", "content": ""}]}, "no earlier call 'q'"),
        ({"messages": [*HELLO, {"role": "assistant", "content": None}]}, "tool_calls"),
        (
            {
                "messages": [
                    *HELLO,
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "[1]"}}],
                    },
                ]
            },
            "not a JSON object",
        ),
        ({"messages": [{"role": "user", "content": "x" * 9000}], "stream": True}, "context"),
    ],
)
def test_what_cannot_be_served_is_a_400_that_names_it(qwen3: OpenAI, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(openai.BadRequestError, match=expected):
        ask(qwen3, **changes)


def test_a_fault_in_a_stream_is_an_error_event(qwen3: OpenAI) -> None:
    demanding: Any = {**schema_of(DEMANDING), **SILENT, "logit_bias": {"66": 100}, "max_tokens": 400}
    with pytest.raises(openai.APIError, match="more than llguidance can follow"):
        list(ask(qwen3, **demanding, stream=True))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tools": TOOLS}, "no tool format"),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}, "enable_thinking"),
    ],
)
def test_what_the_template_does_not_know_is_refused(client: OpenAI, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(openai.BadRequestError, match=expected):
        ask(client, **changes)


def test_fields_that_change_nothing_are_accepted(qwen3: OpenAI) -> None:
    extra: dict[str, Any] = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    extra |= {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "modalities": ["text"]}
    assert ask(qwen3, **extra, seed=1).choices == ask(qwen3, seed=1).choices


def test_the_models_are_told(qwen3: OpenAI) -> None:
    assert qwen3.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        qwen3.models.retrieve("a/b")


def test_the_schema_tells_the_fields(qwen3: OpenAI) -> None:
    schema = httpx.get(str(qwen3.base_url).replace("/v1/", "/openapi.json")).json()
    fields = schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"tools", "response_format", "logit_bias", "min_p", "user", "store"} <= fields.keys()
    answers = schema["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert {"200", "400", "404", "413", "429", "503"} <= answers.keys()
    assert "422" not in answers


def test_lines_of_a_stream_end_where_events_end(qwen3: OpenAI) -> None:
    """U+2028, U+0085 and the like break lines for many readers, httpx among them."""
    schema = {"enum": ["a\u2028b\u2029c\u0085d"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "lines", "schema": schema}}
    with qwen3.chat.completions.with_streaming_response.create(
        model="tiny", messages=HELLO, max_tokens=100, temperature=0, stream=True, response_format=form, **SILENT
    ) as raw:
        lines = [line for line in raw.iter_lines() if line]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert (
        json.loads("".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)) == schema["enum"][0]
    )
