"""Requests that cost far more than they send."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from qwen_onnx.runtime.server.settings import ServerSettings
from tests.fixtures.servers import CHAT, Guarded, guarded, until
from tests.runtime.server.api.conftest import with_template

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
RESPONSES, COMPLETIONS = "/v1/responses", "/v1/completions"


@pytest.fixture(scope="module")
def server(tiny_artifact: Path) -> Iterator[Guarded]:
    with guarded(tiny_artifact, ServerSettings()) as running:
        yield running


def refusal(server: Guarded, path: str, value: dict[str, Any]) -> dict[str, Any]:
    answer = server.http.post(path, json={"model": "tiny", **value})
    assert answer.status_code == 400
    # the answer does not grow with the number of faults
    assert len(answer.content) < 1000
    error: dict[str, Any] = json.loads(answer.content)["error"]
    return error


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (RESPONSES, {"input": [1] * 1_000_000}),
        (CHAT, {"messages": [1] * 400_000}),
        (CHAT, {"messages": [{"role": "user", "content": [[]] * 200_000}]}),
        (COMPLETIONS, {"prompt": [True] * 200_000}),
        (COMPLETIONS, {"prompt": [[1, "a"]] * 100_000}),
        (CHAT, {"messages": [], **{f"unknown{index}": 1 for index in range(100_000)}}),
    ],
)
def test_a_body_of_too_many_values_is_refused(server: Guarded, path: str, value: dict[str, Any]) -> None:
    assert "more than" in refusal(server, path, value)["message"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (RESPONSES, {"input": [1] * 4000}),
        (RESPONSES, {"input": [{"role": "user", "content": [1] * 4000}]}),
        (CHAT, {"messages": [1] * 4000}),
        (CHAT, {"messages": [{"role": "user", "content": [1] * 4000}]}),
        (COMPLETIONS, {"prompt": [True] * 4000}),
    ],
)
def test_of_a_list_of_faults_the_first_is_told(server: Guarded, path: str, value: dict[str, Any]) -> None:
    refusal(server, path, value)


def test_arguments_of_earlier_calls_are_counted_too(server: Guarded) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[" + "[]," * 70_000 + "[]]"}}
    error = refusal(server, CHAT, {"messages": [{"role": "assistant", "tool_calls": [call]}]})
    assert "more than 65536 values" in error["message"]


@pytest.mark.parametrize("stop", ["a" * 200_000, ["a" * 257]])
def test_a_long_stop_string_is_refused(server: Guarded, stop: Any) -> None:
    error = refusal(server, CHAT, {"messages": [{"role": "user", "content": "x"}], "stop": stop})
    assert "at most 256 characters" in error["message"]


def test_a_server_ends_while_its_template_hangs(tiny_artifact: Path, tmp_path: Path) -> None:
    artifact = with_template(tiny_artifact, tmp_path / "looping", LOOP)
    answers: list[int] = []
    # the end of the block waits for the server
    with guarded(artifact, ServerSettings(grace_seconds=1)) as server:

        def ask() -> None:
            with contextlib.suppress(httpx.HTTPError):
                answers.append(server.ask().status_code)

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: any("rendering" in " ".join(child.cmdline()) for child in psutil.Process().children()))
    asking.join(timeout=30)
    assert 200 not in answers
    assert not any("rendering" in " ".join(child.cmdline()) for child in psutil.Process().children())


def test_a_render_counts_into_the_time_of_the_answer(tiny_artifact: Path, tmp_path: Path) -> None:
    source = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}{{ messages[0].content }}"
    artifact = with_template(tiny_artifact, tmp_path / "looping", source)
    with guarded(artifact, ServerSettings(request_seconds=3)) as server:
        answer = server.ask(messages=[{"role": "user", "content": "loop"}])
        assert answer.status_code == 400
        assert "the chat template was stopped" in answer.json()["error"]["message"]
        assert server.ask().status_code == 200
