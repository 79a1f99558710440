"""A hub that lies in its listing, and where a token may go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.catalog.sources import HubSource
from qwen_onnx.errors import SourceError
from qwen_onnx.sources.hub import download
from tests.fixtures.fake_server import Handler, running

SOURCE = HubSource(kind="huggingface", repo="org/tiny", revision="0" * 40)
WEIGHTS = {"type": "file", "path": "model.safetensors", "size": 9, "oid": "0" * 40, "lfs": {"oid": "1" * 64}}


class Listing(Handler):
    """Lists what it is told to, and gives ``{}`` for every file."""

    entries: list[dict[str, Any]]

    def answer(self, path: str, query: dict[str, str]) -> None:
        if "/tree/" in path:
            self.send_json(self.entries)
        else:
            self.send(200, b"{}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running(Listing, entries=[WEIGHTS]) as fake:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{fake.port}")
        yield fake


def entry(name: str, size: int = 2) -> dict[str, Any]:
    """A small file of ``{}``, with the right digest."""
    return {"type": "file", "path": name, "size": size, "oid": "9e26dfeeb6e641a33dae4961196235bdb965b21b"}


@pytest.mark.parametrize(
    "name",
    ["{0}/home/.docker/config.json", "../escaped-config.json", "sub/config.json", ".x-config.json", "a\nconfig.json"],
)
def test_a_listing_cannot_name_a_file_elsewhere(hub: Any, tmp_path: Path, name: str) -> None:
    victim = tmp_path / "home/.docker/config.json"
    victim.parent.mkdir(parents=True)
    victim.write_text("credentials")
    hub.entries = [entry(name.format(tmp_path)), WEIGHTS]
    with pytest.raises(SourceError, match="cannot be the name of a file"):
        download(SOURCE, tmp_path / "cache", lambda _: None)
    assert victim.read_text() == "credentials"
    assert not list(tmp_path.rglob("*escaped*"))
    assert all("/resolve/" not in path for _, path, _ in hub.log), "nothing was asked for"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([WEIGHTS, entry("config.json", 1 << 29)], "config.json is announced with 536,870,912 bytes"),
        ([{**WEIGHTS, "size": 1 << 41}], "model.safetensors is announced with"),
        (
            [{**WEIGHTS, "path": f"{i}.safetensors", "size": 1 << 40} for i in range(5)],
            "more than .* bytes are announced",
        ),
        ([{**WEIGHTS, "lfs": {"oid": "../../../home/victim"}}], "a digest that is none"),
        ([{**WEIGHTS, "size": -1}], "the hub's answer makes no sense"),
        ([WEIGHTS, {**WEIGHTS, "path": "MODEL.safetensors"}], "is there twice"),
        ([{**WEIGHTS, "path": f"{i}.safetensors"} for i in range(10_001)], "10,001 files are announced"),
    ],
)
def test_a_listing_is_bounded(hub: Any, tmp_path: Path, entries: list[dict[str, Any]], words: str) -> None:
    hub.entries = entries
    with pytest.raises(SourceError, match=words):
        download(SOURCE, tmp_path, lambda _: None)
    assert all("/resolve/" not in path for _, path, _ in hub.log), "nothing was asked for"


def test_a_listing_without_end_is_cut_off(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_onnx.sources.hub.LARGEST_LISTING", 1000)
    hub.entries = [{**WEIGHTS, "path": "x" * 2000}]
    with pytest.raises(SourceError, match="the listing is longer than 1,000 bytes"):
        download(SOURCE, tmp_path, lambda _: None)


@pytest.mark.parametrize(
    "endpoint", ["http://192.0.2.1", "http://huggingface.co", "ftp://127.0.0.1", "//x", "http://["]
)
def test_a_token_never_leaves_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    with pytest.raises(SourceError, match=r"not encrypted|not a URL") as caught:
        download(SOURCE, tmp_path, lambda _: None)
    assert "hunter2" not in str(caught.value)


def test_a_token_is_not_repeated_in_a_message(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2\n")
    with pytest.raises(SourceError, match="HF_TOKEN holds a space, a line end") as caught:
        download(SOURCE, tmp_path, lambda _: None)
    assert "hunter2" not in str(caught.value)


def test_a_redirect_to_http_elsewhere_is_not_followed(hub: Any, tmp_path: Path) -> None:
    hub.answer = lambda self, path, query: self.send(307, Location="http://192.0.2.1/listing")
    with pytest.raises(SourceError, match=r"http to 192\.0\.2\.1 is not encrypted"):
        download(SOURCE, tmp_path, lambda _: None)
