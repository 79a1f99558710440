"""``MODEL:ADAPTER`` in the API: listed, asked for on every route, and unknown like an unknown model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from qwen_onnx.runtime import QwenService
from qwen_onnx.runtime.server.app import create_app

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0},
    "/v1/completions": {"prompt": "hello", "max_tokens": 12, "temperature": 0},
    "/v1/responses": {"input": "hello", "max_output_tokens": 16, "temperature": 0},
}


@pytest.fixture(scope="module")
def client(slotted_artifact: Path, adapters: dict[str, Path]) -> Iterator[TestClient]:
    service = QwenService(slotted_artifact, threads=1, context=256, adapters=adapters)
    with TestClient(create_app(service, "tiny")) as connected:
        yield connected


def test_the_list_names_the_model_with_each_adapter(client: TestClient) -> None:
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert names == ["tiny", "tiny:all", "tiny:some"]
    assert client.get("/v1/models/tiny:all").json()["id"] == "tiny:all"
    assert client.get("/v1/models/tiny:nobody").status_code == 404


def said(route: str, answer: dict[str, Any]) -> str:
    if route == "/v1/responses":
        return "".join(part["text"] for item in answer["output"] for part in item["content"])
    choice = answer["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_answers_by_the_adapter_that_is_asked_for(client: TestClient, route: str) -> None:
    told = {}
    for model in ("tiny", "tiny:all", "tiny:some", "tiny"):
        answer = client.post(route, json={"model": model, **ROUTES[route]})
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == model
        assert told.setdefault(model, said(route, answer.json())) == said(route, answer.json())
    assert len(set(told.values())) == 3


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("model", ["tiny:nobody", "tiny:", "all", "other:all", "tiny:all:all"])
def test_an_unknown_adapter_is_an_unknown_model(client: TestClient, route: str, model: str) -> None:
    answer = client.post(route, json={"model": model, **ROUTES[route]})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'tiny:all'" in error["message"]
