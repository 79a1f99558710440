"""The HTTP API as people use it: with the openai client."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.fixtures.servers import until

HELLO: Any = [{"role": "user", "content": "hello"}]


def ask(client: OpenAI, **changes: Any) -> Any:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0, **changes}
    return client.chat.completions.create(**body)


def figure(client: OpenAI, name: str) -> float:
    """A figure of the server's metrics."""
    told = httpx.get(str(client.base_url).replace("/v1/", "/metrics"), trust_env=False).text
    [value] = re.findall(rf"^qwen_onnx_{name} (\S+)$", told, re.MULTILINE)
    return float(value)


def test_streamed_and_whole_answers_agree(client: OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert whole.usage.completion_tokens <= 12
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}


def test_streams_are_real(client: OpenAI) -> None:
    arrivals = [time.monotonic() for _ in ask(client, stream=True, max_tokens=1500)]
    assert len(arrivals) > 20
    assert arrivals[-1] - arrivals[0] > 0.05, "all pieces came at once"


def test_the_model_is_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"messages": []}, "messages"),
        ({"temperature": 9}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"extra_body": {"typo": 1}}, "typo"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "no pictures",
        ),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "context"),
        ({"messages": [{"role": "user", "content": "x" * 1_000_000}]}, "characters"),
        ({"stream": True, "messages": [{"role": "user", "content": "x" * 9000}]}, "context"),
    ],
)
def test_what_cannot_be_served_is_a_400_that_names_it(client: OpenAI, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(openai.BadRequestError, match=expected):
        ask(client, **changes)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"model": "tiny", "messages": "x"}', 400),
        (b'{"model": "other", "messages": [{"role": "user", "content": "x"}]}', 404),
        (b'"' + b"x" * (5 << 20) + b'"', 413),
    ],
)
def test_raw_bodies_get_an_openai_error(client: OpenAI, content: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{client.base_url}chat/completions", content=content, headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_the_event_loop_is_free_while_the_model_computes(client: OpenAI) -> None:
    """A prompt of thousands of tokens is in prefill; /health/live must answer meanwhile."""
    busy = threading.Thread(target=ask, args=(client,), kwargs={"messages": [{"role": "user", "content": "x " * 3500}]})
    busy.start()
    delays = []
    health = str(client.base_url).replace("/v1/", "/health/live")
    with httpx.Client() as probe:
        while busy.is_alive():
            begin = time.monotonic()
            assert probe.get(health).status_code == 200
            delays.append(time.monotonic() - begin)
    busy.join()
    assert len(delays) >= 3
    assert max(delays) < 2.0


def test_a_client_that_leaves_stops_the_generation(client: OpenAI) -> None:
    """With the end of text forbidden, the answer would go on for 8000 tokens."""
    before = figure(client, "generated_tokens_total")
    stream = ask(client, stream=True, max_tokens=8000, logit_bias={"1": -100})
    next(iter(stream))
    # the first chunk is the role alone: no token need be generated yet
    until(lambda: figure(client, "generated_tokens_total") > before, 120)
    assert figure(client, "running_streams") == 1
    stream.close()
    until(lambda: figure(client, "running_streams") == 0, 120)
    # on a busy machine the server learns of it late
    assert figure(client, "generated_tokens_total") - before < 7900
