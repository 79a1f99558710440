"""What a new user meets on their own machine: the model's context and no other limit; coding agents work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.runtime.processing.template import ChatTemplate
from qwen_onnx.runtime.server.keys import KeyRing, digest_of
from qwen_onnx.runtime.server.settings import ServerSettings
from qwen_onnx.runtime.service.policy import OPEN, STRICT
from tests.fixtures.models import LONG_CONTEXT, long_checkpoint
from tests.fixtures.servers import CHAT, Guarded, guarded
from tests.fixtures.tools import fresh_cli, run_cli
from tests.runtime.server.test_serve import process

CLAMPED = "x-max-tokens-clamped"
KEY = "qo-someone-0123456789"


@pytest.fixture(scope="module")
def local(long_artifact: Path) -> Iterator[Guarded]:
    with guarded(long_artifact, ServerSettings()) as running:
        yield running


@pytest.mark.parametrize(
    ("changes", "keyed", "expected"),
    [
        ({}, False, OPEN),
        ({}, True, STRICT),
        ({"host": "0.0.0.0", "insecure": True}, False, STRICT),
        ({"allowed_hosts": ("models.example",)}, False, STRICT),
    ],
)
def test_only_the_machines_own_users_go_without_limits(changes: dict[str, Any], keyed: bool, expected: object) -> None:
    settings = ServerSettings(**changes)
    assert settings.policy(keyed) == expected
    told = settings.model_copy(update={"max_tokens": 7, "rate_limit": 3}).policy(keyed)
    assert (told.max_tokens, told.rate_limit) == (7, 3)


@pytest.mark.slow
def test_a_prompt_of_two_thousand_words_is_answered(local: Guarded) -> None:
    words = [{"role": "user", "content": "a word " * 2000}]
    answer = local.ask(messages=words)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] > 14_000
    assert "x-ratelimit-limit-requests" not in answer.headers


def test_with_keys_the_strict_numbers_hold(long_artifact: Path) -> None:
    with guarded(long_artifact, ServerSettings(), keys=KeyRing({digest_of(KEY): "someone"})) as keyed:
        long = keyed.ask(KEY, messages=[{"role": "user", "content": "a word " * 2000}])
        many = keyed.ask(KEY, max_tokens=1025)
        whole = keyed.ask(KEY)
    assert "the most is 8192" in long.json()["error"]["message"]
    assert "max_tokens is 1025, the most is 1024" in many.json()["error"]["message"]
    assert (long.status_code, many.status_code, whole.status_code) == (400, 400, 200)
    assert whole.headers["x-ratelimit-limit-requests"] == "100"


# a prompt that leaves a few tokens of the context, as each route has it
FILLED = "x" * (LONG_CONTEXT - 200)
ROUTES: list[tuple[str, str, dict[str, Any]]] = [
    ("chat/completions", "max_tokens", {"messages": [{"role": "user", "content": FILLED}]}),
    ("chat/completions", "max_completion_tokens", {"messages": [{"role": "user", "content": FILLED}]}),
    ("completions", "max_tokens", {"prompt": [FILLED, "hello"]}),
    ("responses", "max_output_tokens", {"input": FILLED}),
]


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("route", "field", "body"), ROUTES)
def test_what_the_context_cannot_hold_is_lowered_and_told(
    local: Guarded, route: str, field: str, body: dict[str, Any], stream: bool
) -> None:
    asked = {"model": "tiny", "stream": stream, "stop": "\n", **body}
    if route == "responses":
        del asked["stop"]
    answer = local.http.post(f"/v1/{route}", json={**asked, field: 800})
    assert answer.status_code == 200, answer.text
    assert 0 < int(answer.headers[CLAMPED]) <= 200
    within = local.http.post(f"/v1/{route}", json={**asked, field: 2})
    assert within.status_code == 200
    assert CLAMPED not in within.headers


def tool(name: str, properties: dict[str, Any], required: list[str], **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required, **more}
    told = f"Does what {name} says. " * 5
    return {"type": "function", "function": {"name": name, "description": told, "parameters": parameters}}


def agents_request() -> dict[str, Any]:
    """The shape of what Qwen Code 0.15 sends first: a long system message, parts, tools, a stream with usage."""
    text, number = {"type": "string", "description": "what it is"}, {"type": "number"}
    draft, closed = {"$schema": "http://json-schema.org/draft-07/schema#"}, {"additionalProperties": False}
    state = {"type": "string", "enum": ["pending", "done"]}
    entry = {"content": {"type": "string", "minLength": 1}, "status": state, "id": {"type": "string"}}
    items = {"type": "object", "properties": entry, "required": list(entry), **closed}
    count = {"type": "integer", "minimum": 1, "maximum": 20, "default": 5}
    return {
        "messages": [
            {"role": "system", "content": "You work on the code of this folder. " * 250},
            {"role": "user", "content": [{"type": "text", "text": "Today is a Monday. The folder is /work."}]},
            {"role": "assistant", "content": "Got it."},
            {"role": "user", "content": [{"type": "text", "text": "Say hello"}]},
        ],
        "tools": [
            tool("read_file", {"file_path": text, "offset": number, "limit": number}, ["file_path"]),
            tool("find_tools", {"query": {**text, "minLength": 1}, "max_results": count}, ["query"], **closed),
            tool("ask_another", {"prompt": text, "background": {"type": "boolean"}}, ["prompt"], **draft, **closed),
            tool("write_list", {"todos": {"type": "array", "items": items}}, ["todos"], **draft),
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 8000,
    }


@pytest.mark.slow
def test_the_first_request_of_a_coding_agent_is_answered(local: Guarded) -> None:
    answer = local.http.post(CHAT, json={"model": "tiny", "stop": "\n", **agents_request()})
    assert answer.status_code == 200, answer.text
    assert 0 < int(answer.headers[CLAMPED]) < 8000
    chunks = [
        json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: {")
    ]
    assert not [chunk for chunk in chunks if "error" in chunk]
    assert chunks[-1]["usage"]["prompt_tokens"] > 8192
    assert answer.text.rstrip().endswith("data: [DONE]")


def test_a_request_is_parsed_and_rendered_once(local: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[int] = []
    render = ChatTemplate.render

    def counted(self: ChatTemplate, *arguments: Any, **more: Any) -> str:
        rendered.append(1)
        return render(self, *arguments, **more)

    async def again(_: object) -> None:
        raise AssertionError("the gate has parsed the body")

    monkeypatch.setattr(ChatTemplate, "render", counted)
    monkeypatch.setattr("starlette.requests.Request.json", again)
    for route, body in (
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("responses", {"input": "x"}),
    ):
        answer = local.http.post(f"/v1/{route}", json={"model": "tiny", **body})
        assert answer.status_code == 200, answer.text
    assert len(rendered) == 2


def test_serve_says_which_limits_hold() -> None:
    told = " ".join(fresh_cli("serve", "--help", env={**os.environ, "COLUMNS": "400"}).stdout.split())
    assert "8192 characters, 1024 tokens and 100 requests an hour" in told


@pytest.fixture
def qwen_code() -> Path:
    """Qwen's own coding agent, from npm; installed outside the checkout, once."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("npm is missing: Qwen Code is a node program")
    folder = Path(os.environ.get("QWEN_ONNX_CACHE", Path.home() / ".cache/qwen-onnx")) / "qwen-code" / QWEN_CODE
    program = folder / "node_modules/.bin/qwen"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        package = f"@qwen-code/qwen-code@{QWEN_CODE}"
        command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"npm cannot install {package}: {done.stderr[-200:]}")
    return program


QWEN_CODE = "0.15.10"


@pytest.mark.slow
def test_qwen_code_gets_past_its_first_request(qwen_code: Path, tmp_path: Path) -> None:
    """A token of the tiny model is a byte: of its 66,000 characters the 38,000 of the system prompt are left out."""
    checkpoint = long_checkpoint(tmp_path, 65536)
    built = tmp_path / "built"
    done = run_cli("optimize", "starter", "--source", checkpoint, "--output", built, "--no-verify")
    assert done.returncode == 0, done.stderr
    with process(built, tmp_path) as running:
        environment = {
            **os.environ,
            "HOME": str(tmp_path),
            "OPENAI_BASE_URL": f"{running.http.base_url}/v1",
            "OPENAI_API_KEY": "none",
            "OPENAI_MODEL": running.model,
            # a random model does not stop by itself
            "QWEN_CODE_MAX_OUTPUT_TOKENS": "16",
            "QWEN_CODE_API_TIMEOUT_MS": "900000",
        }
        command = [str(qwen_code), "-p", "Say hello", "--system-prompt", "You help.", "--output-format", "json"]
        said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        requests = [line for line in running.log_lines() if line.get("route") == CHAT]
    events = json.loads(said.stdout)
    models = events[-1]["stats"]["models"]
    assert models[running.model]["api"]["totalErrors"] == 0, said.stdout
    assert requests
    assert {line["status"] for line in requests} == {200}
    assert requests[0]["prompt_tokens"] > 20_000
