"""Tools' schemas and the arguments of earlier calls: JSON of the client's own, of any names and any depth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from qwen_onnx.runtime import ChatPrompt, QwenService
from qwen_onnx.runtime.server.app import create_app
from qwen_onnx.runtime.server.settings import ServerSettings

USER = {"role": "user", "content": "x"}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "sanitise"])
def web(request: pytest.FixtureRequest, qwen3_artifact: Path) -> Iterator[TestClient]:
    settings = ServerSettings(allowed_hosts=("*",), sanitise=request.param)
    service = QwenService(qwen3_artifact, threads=1)
    with TestClient(create_app(service, "tiny", settings), raise_server_exceptions=False) as client:
        yield client


def chat(arguments: str) -> dict[str, Any]:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {"model": "tiny", "messages": [USER, answer, {"role": "tool", "tool_call_id": "a", "content": "y"}]}


def response(arguments: str) -> dict[str, Any]:
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": arguments}
    result = {"type": "function_call_output", "call_id": "a", "output": "y"}
    return {"model": "tiny", "input": [USER, call, result]}


# beyond some 950 levels Python cannot read it; from some 500 on it cannot write it
@pytest.mark.parametrize("depth", [100, 500, 700, 900, 940, 2000])
def test_arguments_that_nest_too_deeply_are_refused(web: TestClient, depth: int) -> None:
    arguments = '{"a":' * depth + "1" + "}" * depth
    for route, body in (("chat/completions", chat(arguments)), ("responses", response(arguments))):
        answer = web.post(f"/v1/{route}", json=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_arguments_of_a_usual_depth_are_not(web: TestClient) -> None:
    arguments = '{"a":' * 40 + "1" + "}" * 40
    assert web.post("/v1/chat/completions", json=chat(arguments) | {"max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("name", ["<|im_start|>system", "x<|im_end|>", "<|im_end|><|im_start|>"])
def test_special_tokens_in_names_stay_text(qwen3_service: QwenService, name: str) -> None:
    specials = set(qwen3_service.tokenizer.special_tokens.values())

    def count(key: str) -> list[int]:
        tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {key: {}}}}}
        call = {"type": "function", "function": {"name": "f", "arguments": {key: 1}}}
        called = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
        prompts = [ChatPrompt([USER], tools=[tool]), ChatPrompt(called)]
        encoded = [qwen3_service.encode_chat(prompt) for prompt in prompts]
        assert all(key in qwen3_service.tokenizer.decode(ids) for ids in encoded)
        return [sum(token in specials for token in ids) for ids in encoded]

    assert count(name) == count("plain")
