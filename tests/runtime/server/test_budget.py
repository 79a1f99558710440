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
from tests.fixtures.templates import with_template

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
RESPONSES, COMPLETIONS = "/v1/responses", "/v1/completions"


@pytest.fixture(scope="module")
def server(tiny_artifact: Path) -> Iterator[Guarded]:
    with guarded(tiny_artifact, ServerSettings(max_input_characters=8192)) as running:
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


def rendering() -> set[int]:
    """Processes of this one that render templates."""
    return {child.pid for child in psutil.Process().children() if "rendering" in " ".join(child.cmdline())}


@pytest.mark.slow
def test_a_server_ends_while_its_template_hangs(tiny_artifact: Path, tmp_path: Path) -> None:
    artifact = with_template(tiny_artifact, tmp_path / "looping", LOOP)
    answers: list[int] = []
    others = rendering()
    # the end of the block waits for the server
    with guarded(artifact, ServerSettings(grace_seconds=1)) as server:

        def ask() -> None:
            with contextlib.suppress(httpx.HTTPError):
                answers.append(server.ask().status_code)

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: bool(rendering() - others))
    asking.join(timeout=30)
    assert 200 not in answers
    assert not rendering() - others


@pytest.mark.slow
def test_a_render_counts_into_the_time_of_the_answer(tiny_artifact: Path, tmp_path: Path) -> None:
    source = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}{{ messages[0].content }}"
    artifact = with_template(tiny_artifact, tmp_path / "looping", source)
    with guarded(artifact, ServerSettings(request_seconds=3)) as server:
        answer = server.ask(messages=[{"role": "user", "content": "loop"}])
        assert answer.status_code == 400
        assert "the chat template was stopped" in answer.json()["error"]["message"]
        assert server.ask().status_code == 200


def held_to(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Requests that bring a schema, in each place where one may stand."""
    user = [{"role": "user", "content": "x"}]
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    return [
        (CHAT, {"messages": user, "response_format": form}),
        (RESPONSES, {"input": "x", "text": {"format": {"type": "json_schema", "name": "s", "schema": schema}}}),
        (CHAT, {"messages": user, "tools": [{"type": "function", "function": function}]}),
        (RESPONSES, {"input": "x", "tools": [{"type": "function", **function}]}),
    ]


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"enum": ["a" * 8000]}, "more than 1000 characters in a text"),
        ({"enum": [{"description": "a" * 8000}]}, "more than 1000 characters in a text"),
        ({"enum": [f"value {index}" for index in range(513)]}, "more than 512 values in an enum"),
        ({"properties": {f"p{index}": {} for index in range(257)}}, "more than 256 members"),
        ({"enum": ["a" * 999 + str(index % 10) for index in range(100)]}, "characters in JSON schemas"),
    ],
)
def test_schemas_are_bounded(server: Guarded, schema: dict[str, Any], expected: str) -> None:
    for path, value in held_to(schema):
        assert expected in refusal(server, path, value)["message"]


@pytest.mark.parametrize("schema", [{"enum": ["a" * 900 + str(index) for index in range(20)]}, {"title": "a" * 9000}])
def test_the_schema_of_an_answer_counts_as_input(server: Guarded, schema: dict[str, Any]) -> None:
    for path, value in held_to(schema)[:2]:
        assert "the most is 8192" in refusal(server, path, value)["message"]
