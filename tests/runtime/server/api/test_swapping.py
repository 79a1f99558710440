"""Adapters that are loaded and dropped while a server runs: whoever has a key may, within a budget, by bare names."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from safetensors.numpy import load_file

from qwen_onnx.artifact.adapter_file import RECORD, write_adapter_file
from qwen_onnx.errors import ConfigError
from qwen_onnx.runtime import QwenService
from qwen_onnx.runtime.engines.batch.steps import Steps
from qwen_onnx.runtime.engines.batch.stream import Stream
from qwen_onnx.runtime.server.app import create_app
from qwen_onnx.runtime.server.keys import KeyRing, digest_of
from qwen_onnx.runtime.server.settings import ServerSettings
from tests.fixtures.servers import Guarded, guarded, until

KEY = "qo-of-a-test-0123456789"
PROMPT = "hello " * 30
# `all` has 38 kB, `some` less: two of them and no more
BUDGET = 90_000


class Adapters:
    """A server's adapters, asked for with a key."""

    def __init__(self, client: Guarded, folder: Path) -> None:
        self.http, self.folder = client.http, folder
        self.http.headers["authorization"] = f"Bearer {KEY}"

    def load(self, name: Any) -> httpx.Response:
        return self.http.post("/v1/adapters", json={"name": name})

    def drop(self, name: str) -> httpx.Response:
        return self.http.delete(f"/v1/adapters/{name}")

    def loaded(self) -> list[str]:
        told = self.http.get("/v1/adapters").json()["data"]
        return [adapter["name"] for adapter in told if adapter["loaded"]]

    def ask(self, name: str, prompt: str = PROMPT) -> httpx.Response:
        body = {"model": f"tiny:{name}", "prompt": prompt, "max_tokens": 8, "temperature": 0}
        return self.http.post("/v1/completions", json=body)

    def said(self, name: str, prompt: str = PROMPT) -> str:
        answer = self.ask(name, prompt)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])


def changed(source: Path, target: Path, **record: Any) -> Path:
    """The same numbers with another record."""
    with source.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    told = json.loads(header["__metadata__"][RECORD])
    del told["content"]
    tensors = load_file(source)
    write_adapter_file(target, {name: tensors[name] for name in header if name in tensors}, **{**told, **record})
    return target


@pytest.fixture(scope="module")
def folder(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("folder")
    for name, file in adapters.items():
        shutil.copy(file, made / f"{name}.safetensors")
        changed(file, made / f"{name}-2.safetensors", name="second")
    return made


@pytest.fixture(scope="module")
def server(slotted_artifact: Path, adapters: dict[str, Path], folder: Path) -> Iterator[Adapters]:
    settings = ServerSettings(adapter_folder=folder, adapter_budget=BUDGET)
    options = {"context": 2048, "adapters": {"kept": adapters["all"]}, "adapter_budget": BUDGET}
    keys = KeyRing({digest_of(KEY): "alice"})
    with guarded(slotted_artifact, settings, options=options, keys=keys) as client:
        yield Adapters(client, folder)


@pytest.fixture(autouse=True)
def _emptied(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        server: Adapters = request.getfixturevalue("server")
        for name in server.loaded():
            if name != "kept":
                until(lambda name=name: server.drop(name).status_code == 200)  # type: ignore[misc]


def test_an_adapter_is_loaded_asked_for_and_dropped(server: Adapters) -> None:
    assert server.loaded() == ["kept"]
    refused = server.ask("all")
    assert refused.status_code == 404
    assert 'POST /v1/adapters {"name": "all"}' in refused.json()["error"]["message"]
    told = server.load("all").json()
    assert (told["model"], told["loaded"], told["rank"], told["verdict"]) == ("tiny:all", True, 4, "UNVERIFIED")
    assert server.said("all") == server.said("kept")
    listed = server.http.get("/v1/adapters").json()
    assert {adapter["name"]: adapter["loaded"] for adapter in listed["data"]} == {
        "all": True,
        "all-2": False,
        "kept": True,
        "some": False,
        "some-2": False,
    }
    assert (listed["used"], listed["budget"]) == (told["bytes"], BUDGET)
    models = server.http.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["tiny", "tiny:all", "tiny:kept"]
    assert server.drop("all").json() == {"object": "adapter.deleted", "name": "all", "deleted": True}
    assert server.ask("all").status_code == 404
    assert server.drop("all").status_code == 404


def test_the_least_recently_used_one_makes_room(server: Adapters) -> None:
    assert [server.load(name).status_code for name in ("all", "some", "all")] == [200] * 3
    server.said("some")
    assert server.load("all-2").status_code == 200
    # `all` was loaded last, `some` was asked for last
    assert server.loaded() == ["all-2", "kept", "some"]


def test_those_that_answer_are_not_dropped(
    slotted_artifact: Path, adapters: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine is in this process and waits behind the first token: a tiny model would be done before it is asked."""
    goes, decode = threading.Event(), Steps._decode

    def held(steps: Steps, streams: list[Stream]) -> None:
        assert goes.wait(60)
        decode(steps, streams)

    monkeypatch.setattr(Steps, "_decode", held)
    settings = ServerSettings(adapter_folder=folder, adapter_budget=BUDGET)
    options = {"context": 2048, "isolated": False, "adapters": {"kept": adapters["all"]}, "adapter_budget": BUDGET}
    with guarded(slotted_artifact, settings, options=options, keys=KeyRing({digest_of(KEY): "alice"})) as client:
        server = Adapters(client, folder)
        assert server.load("all").status_code == 200
        body = {"model": "tiny:all", "prompt": "hello", "max_tokens": 8, "temperature": 0, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            refused = server.drop("all")
            assert refused.status_code == 409, refused.text
            assert "are under way" in refused.json()["error"]["message"]
            assert server.load("some").status_code == 200
            # `all` is older, and busy
            assert server.load("all-2").status_code == 200
            assert server.loaded() == ["all", "all-2", "kept"]
            goes.set()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        until(lambda: server.drop("all").status_code == 200)


def test_another_of_one_name_is_refused_and_finds_no_prefix_of_the_first(
    server: Adapters, adapters: dict[str, Path]
) -> None:
    file = server.folder / "faq.safetensors"
    shutil.copy(adapters["all"], file)
    assert server.load("faq").status_code == 200
    assert server.load("faq").status_code == 200
    prompt = "of this test alone " * 9
    first = server.said("faq", prompt)
    shutil.copy(adapters["some"], file)
    refused = server.load("faq")
    assert refused.status_code == 409
    assert "unload it first" in refused.json()["error"]["message"]
    assert server.said("faq", prompt) == first
    assert server.drop("faq").status_code == 200
    assert server.load("faq").status_code == 200
    again = server.ask("faq", prompt).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    server.load("some")
    assert again["choices"][0]["text"] == server.said("some", prompt) != first
    file.unlink()


def test_those_of_the_command_line_stay(server: Adapters) -> None:
    shutil.copy(server.folder / "some.safetensors", server.folder / "kept.safetensors")
    assert server.load("kept").status_code == 409
    assert server.drop("kept").status_code == 409
    (server.folder / "kept.safetensors").unlink()
    assert server.loaded() == ["kept"]


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../all", "/etc/passwd", "a/b", "all.safetensors/", "All", "all\x00", "x" * 61, 5, None, ["all"]],
)
def test_what_is_no_bare_name_is_refused(server: Adapters, name: Any) -> None:
    answer = server.load(name)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "name"


def test_unknown_keys_and_names_are_refused(server: Adapters) -> None:
    assert server.load("nobody").status_code == 404
    assert server.http.post("/v1/adapters", json={"name": "all", "path": "/tmp/x"}).status_code == 400
    for name in ("nobody", "..%2Fall", "%2e%2e"):
        assert server.drop(name).status_code == 404
    assert server.loaded() == ["kept"]


def write_bad(kind: str, file: Path, source: Path) -> None:
    """A file that must not be loaded."""
    if kind == "base":
        changed(source, file, base={"model": "other", "weights": "0" * 64})
    elif kind == "rank":
        changed(source, file, rank=16)
    elif kind == "shape":
        changed(source, file, rank=3)
    elif kind == "failed":
        changed(source, file, verdict="FAIL")
    elif kind == "pickle":
        file.write_bytes(pickle.dumps({"weights": list(range(999))}))
    elif kind == "truncated":
        file.write_bytes(source.read_bytes()[:-4])
    elif kind == "altered":
        content = bytearray(source.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif kind == "link":
        file.symlink_to(source)
    elif kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.write_bytes(source.read_bytes() + b"\0" * BUDGET)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("base", "it belongs to other weights"),
        ("rank", "its rank is 16, the artifact's slots take 8"),
        ("shape", "its slot takes"),
        ("failed", "its training ended with FAIL"),
        ("pickle", "is not an adapter in safetensors form"),
        ("truncated", "bytes of weights"),
        ("altered", "is truncated or altered"),
        ("link", "is not a plain file"),
        ("folder", "is not a plain file"),
        ("pipe", "is not a plain file"),
        ("oversize", "adapters may have 90,000"),
    ],
)
def test_files_of_strangers_are_refused(server: Adapters, adapters: dict[str, Path], kind: str, words: str) -> None:
    file = server.folder / "bad.safetensors"
    write_bad(kind, file, adapters["all"])
    answer = server.load("bad")
    shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert words in message
    assert str(server.folder) not in message
    assert server.loaded() == ["kept"]


def test_without_a_key_nothing_is_told(server: Adapters) -> None:
    for method, path in (("GET", "/v1/adapters"), ("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/all")):
        answer = server.http.request(method, path, headers={"authorization": "Bearer wrong"}, json={"name": "all"})
        assert answer.status_code == 401


def test_an_engine_that_died_comes_back_with_what_was_loaded(
    slotted_artifact: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    files = {name: Path(shutil.copy(file, tmp_path)) for name, file in adapters.items()}
    with QwenService(slotted_artifact, threads=1, isolated=True, context=256, adapter_budget=BUDGET) as service:
        for name, file in files.items():
            service.load_adapter(name, file)
        assert service.adapters == ("all", "some")
        # it has changed since, and another one must not answer in its name
        shutil.copy(files["all"], files["some"])
        os.kill(service.engine.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        until(lambda: service.stats().restarts == 1 and service.stats().alive)
        assert service.adapters == ("all",)


def test_there_are_no_such_routes_without_a_folder(slotted_artifact: Path, folder: Path, tmp_path: Path) -> None:
    keys = KeyRing({digest_of(KEY): "alice"})
    service = QwenService(slotted_artifact, threads=1, context=256)
    headers = {"authorization": f"Bearer {KEY}"}
    with TestClient(create_app(service, "tiny", ServerSettings(allowed_hosts=("*",)), keys=keys)) as client:
        assert client.post("/v1/adapters", json={"name": "all"}, headers=headers).status_code == 404
        assert "/v1/adapters" not in client.get("/openapi.json", headers=headers).json()["paths"]
        with pytest.raises(ConfigError, match="there are no API keys"):
            create_app(service, "tiny", ServerSettings(adapter_folder=folder))
        with pytest.raises(ConfigError, match="no such folder"):
            create_app(service, "tiny", ServerSettings(adapter_folder=tmp_path / "none"), keys=keys)
