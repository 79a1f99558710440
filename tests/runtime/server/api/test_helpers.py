"""What clients build on chat completions: records and tools made of pydantic models, agents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.runtime.server.api.test_chat import HELLO, SILENT, WEATHER


class Place(BaseModel):
    """A place."""

    city: Literal["Köln", "Oslo"]
    days: Literal[1, 2] | None


@pytest.mark.slow
def test_the_helpers_of_the_openai_client_parse(qwen3: OpenAI) -> None:
    """Both send strict schemas made of pydantic models, with everything that pydantic writes into them."""
    form = qwen3.chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Place, max_tokens=400, temperature=0, **SILENT
    )
    assert form.choices[0].message.parsed is not None
    assert form.choices[0].message.parsed.city in ("Köln", "Oslo")
    tools = [openai.pydantic_function_tool(Place)]
    made = qwen3.chat.completions.parse(
        model="tiny",
        messages=HELLO,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=400,
        **SILENT,
    )
    calls = made.choices[0].message.tool_calls
    assert calls
    assert isinstance(calls[0].function.parsed_arguments, Place)


@pytest.mark.slow
def test_langchain_calls_tools_and_makes_records(qwen3: OpenAI) -> None:
    from langchain_openai import ChatOpenAI

    url = str(qwen3.base_url).rstrip("/")
    settings: dict[str, Any] = {"model": "tiny", "base_url": url, "api_key": "none", "max_retries": 0}
    chat = ChatOpenAI(**settings, **SILENT, temperature=0, max_tokens=400)
    record = chat.with_structured_output(Place).invoke("where?")
    assert isinstance(record, Place)
    bound = chat.bind_tools([WEATHER], tool_choice="weather")
    answer = bound.invoke("where?")
    assert [call["name"] for call in answer.tool_calls] == ["weather"]
    streamed: Any = None
    for piece in bound.stream("where?"):
        streamed = piece if streamed is None else streamed + piece
    assert [call["args"] for call in streamed.tool_calls] == [call["args"] for call in answer.tool_calls]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "sunny"} for call in answer.tool_calls]
    assert chat.invoke([("human", "where?"), answer, *results]).response_metadata["finish_reason"]


# litellm takes long to import, and reads its settings when it is imported
LITELLM = """
import json, sys
import litellm
url, weather, extra = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
asked = dict(model="openai/tiny", api_base=url, api_key="none", max_tokens=400, temperature=0, num_retries=0, **extra)
asked["messages"] = [{"role": "user", "content": "where?"}]
asked["tools"], asked["tool_choice"] = [weather], {"type": "function", "function": {"name": "weather"}}
whole = litellm.completion(**asked).choices[0].message.tool_calls
pieces = list(litellm.completion(**asked, stream=True))
streamed = litellm.stream_chunk_builder(pieces).choices[0].message.tool_calls
print(json.dumps([[(call.function.name, call.function.arguments) for call in calls] for calls in (whole, streamed)]))
"""


@pytest.mark.slow
def test_litellm_calls_tools(qwen3: OpenAI) -> None:
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", LITELLM, str(qwen3.base_url).rstrip("/"), json.dumps(WEATHER), json.dumps(SILENT)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=240, env={**os.environ, **offline}
    )
    assert done.returncode == 0, done.stderr
    whole, streamed = json.loads(done.stdout.splitlines()[-1])
    assert whole == streamed
    assert [name for name, _ in whole] == ["weather"]
    assert json.loads(whole[0][1])["city"]
