"""The clients that people have, unchanged, against the live server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from openai import APIStatusError, AsyncOpenAI, OpenAI

MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
MOST = 12


def url_of(client: OpenAI) -> str:
    return str(client.base_url).rstrip("/")


def reference(client: OpenAI) -> Any:
    """A greedy answer, which every other client and way must give as well."""
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=MOST, temperature=0)
    assert answer.choices[0].message.content
    return answer


def test_the_raw_response_is_http_as_openai_speaks_it(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=MESSAGES, max_tokens=MOST)
    assert raw.status_code == 200
    assert raw.headers["content-type"] == "application/json"
    body = json.loads(raw.content)
    assert body["object"] == "chat.completion"
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
    assert raw.parse().choices[0].message.role == "assistant"
    with pytest.raises(APIStatusError) as caught:
        client.chat.completions.with_raw_response.create(model="other", messages=MESSAGES)
    assert caught.value.status_code == 404
    assert caught.value.code == "model_not_found"


def test_a_raw_stream_is_server_sent_events(client: OpenAI) -> None:
    with client.chat.completions.with_streaming_response.create(
        model="tiny", messages=MESSAGES, max_tokens=MOST, temperature=0, stream=True
    ) as raw:
        assert raw.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in raw.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"


def test_the_asynchronous_client_gets_the_same(client: OpenAI) -> None:
    expected = reference(client).choices[0].message.content
    body: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": MOST, "temperature": 0}

    async def ask() -> tuple[list[Any], str]:
        async with AsyncOpenAI(base_url=url_of(client), api_key="none", max_retries=0) as asynchronous:
            whole = await asyncio.gather(*(asynchronous.chat.completions.create(**body) for _ in range(3)))
            stream = await asynchronous.chat.completions.create(**body, stream=True)
            return whole, "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    whole, streamed = asyncio.run(ask())
    assert streamed == expected
    assert [answer.choices[0].message.content for answer in whole] == [expected] * 3


@pytest.mark.slow
def test_langchain_invokes_streams_and_batches(client: OpenAI) -> None:
    from langchain_openai import ChatOpenAI

    expected = reference(client)
    settings: dict[str, Any] = {"model": "tiny", "base_url": url_of(client), "api_key": "none", "max_retries": 0}
    chat = ChatOpenAI(**settings, temperature=0, max_tokens=MOST)
    talk = [("system", "Be brief."), ("human", "hello")]
    answer = chat.invoke(talk)
    assert answer.text == expected.choices[0].message.content
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["total_tokens"] == expected.usage.total_tokens
    assert answer.response_metadata["finish_reason"] == expected.choices[0].finish_reason
    pieces = list(chat.stream(talk))
    assert len(pieces) > 2
    assert "".join(piece.text for piece in pieces) == answer.text
    assert [one.text for one in chat.batch([talk, talk])] == [answer.text] * 2


# litellm takes long to import, and reads these when it is imported
LITELLM = """
import asyncio, json, sys
import litellm
litellm.telemetry = False
url, messages, most = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
common = dict(model="openai/tiny", api_base=url, api_key="none", messages=messages, max_tokens=most, temperature=0)
common["num_retries"] = 0
whole = litellm.completion(**common)
streamed = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**common, stream=True)]
later = asyncio.run(litellm.acompletion(**common))
try:
    litellm.completion(**{**common, "temperature": 9})
    refused = "answered"
except litellm.BadRequestError as error:
    refused = str(error)
print(json.dumps({
    "whole": whole.choices[0].message.content,
    "streamed": streamed,
    "later": later.choices[0].message.content,
    "tokens": whole.usage.total_tokens,
    "reason": whole.choices[0].finish_reason,
    "refused": refused,
}))
"""


@pytest.mark.slow
def test_litellm_completes_streams_and_refuses(client: OpenAI) -> None:
    expected = reference(client)
    # its list of prices would come from the network, as would its telemetry go there
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", LITELLM, url_of(client), json.dumps(MESSAGES), str(MOST)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=240, env={**os.environ, **offline}
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    text = expected.choices[0].message.content
    assert told["whole"] == told["later"] == "".join(told["streamed"]) == text
    assert len(told["streamed"]) > 2
    assert told["tokens"] == expected.usage.total_tokens
    assert told["reason"] == expected.choices[0].finish_reason
    assert "temperature" in told["refused"]
