"""The limits of an answer hold on every route."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from qwen_onnx.runtime import QwenService
from qwen_onnx.runtime.server.app import create_app
from qwen_onnx.runtime.server.settings import ServerSettings

MESSAGES = [{"role": "user", "content": "hello"}]
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("chat/completions", {"messages": MESSAGES, "max_tokens": 8000}),
    ("completions", {"prompt": "hello", "max_tokens": 8000}),
    ("responses", {"input": "hello", "max_output_tokens": 8000}),
]


@pytest.mark.parametrize(("route", "body"), ROUTES)
def test_an_answer_that_takes_too_long_ends(tiny_artifact: Path, route: str, body: dict[str, Any]) -> None:
    settings = ServerSettings(allowed_hosts=("*",), max_tokens=100_000, request_seconds=0.05)
    service = QwenService(tiny_artifact, threads=1)
    with TestClient(create_app(service, "tiny", settings)) as client:
        assert service.template
        # rendering may take longer than that on a busy machine, which would be another fault: the template's
        service.template.seconds = None
        asked = {"model": "tiny", **body}
        assert client.post(f"/v1/{route}", json=asked).status_code == 504
        streamed = client.post(f"/v1/{route}", json={**asked, "stream": True})
        assert "was not finished within" in streamed.text
        assert service.stats().running == 0
        metrics = client.get("/metrics").text
        assert 'qwen_onnx_generation_faults_total{error="DeadlineError"} 2.0' in metrics


def test_what_the_template_adds_does_not_count(tiny_artifact: Path) -> None:
    settings = ServerSettings(allowed_hosts=("*",), max_input_characters=20)
    body = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "x" * 20}]}
    with TestClient(create_app(QwenService(tiny_artifact, threads=1), "tiny", settings)) as client:
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        body["messages"][0]["content"] += "x"  # type: ignore[index]
        assert client.post("/v1/chat/completions", json=body).status_code == 400
