"""Traces: one span for each request, with what it came to and no text; and life without the extra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from qwen_onnx.errors import EnvironmentFault
from qwen_onnx.runtime.server.settings import ServerSettings
from qwen_onnx.runtime.server.tracing import Tracer, make_tracer
from tests.fixtures.servers import CHAT, guarded, until

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.slow
def test_a_span_tells_what_a_request_came_to(tiny_artifact: Path) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with guarded(tiny_artifact, ServerSettings(), tracer=Tracer(provider, "tiny")) as server:
        message = {"role": "user", "content": "zanzibar"}
        body = {"model": "tiny", "messages": [message], "max_tokens": 6, "stream": True}
        assert server.http.post(CHAT, json=body, headers={"traceparent": PARENT}).status_code == 200
        assert server.ask(temperature=9).status_code == 400
        assert server.http.get("/health/live").status_code == 200
        until(lambda: len(exporter.get_finished_spans()) == 3)
        chat, refused, probe = exporter.get_finished_spans()
    assert chat.name == "chat tiny"
    assert chat.parent is not None
    assert f"{chat.parent.trace_id:032x}" == PARENT.split("-")[1]
    told = dict(chat.attributes or {})
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.request.model"] == "tiny"
    assert told["gen_ai.usage.output_tokens"] == 6
    assert told["gen_ai.usage.input_tokens"]
    assert told["gen_ai.response.finish_reasons"] == ("length",)
    assert told["http.response.status_code"] == 200
    assert "zanzibar" not in chat.to_json()
    assert (refused.attributes or {})["http.response.status_code"] == 400
    assert probe.name == "GET /health/live"


def test_without_the_extra_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'qwen-onnx\[otel\]'"):
        make_tracer("http://127.0.0.1:9/v1/traces", "tiny")


WITHOUT = """
import sys
# the API itself is a dependency of FastAPI
sys.modules["opentelemetry.sdk"] = sys.modules["opentelemetry.exporter"] = None
from fastapi.testclient import TestClient
from qwen_onnx.runtime.server.app import create_app
from qwen_onnx.runtime.service.qwen import QwenService
body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
with TestClient(create_app(QwenService(sys.argv[1], threads=1), "tiny")) as client:
    print(client.post("/v1/chat/completions", json=body).status_code)
"""


@pytest.mark.slow
def test_a_server_without_the_extra_works(tiny_artifact: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, str(tiny_artifact)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "200", done.stderr
