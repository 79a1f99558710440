"""Hugging Face Hub and ModelScope, faked at the HTTP level: the clients are the hubs' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.live import free_port
from tests.fixtures.fake_hubs import sha256
from tests.publish.conftest import LARGEST, SMALL_FILES, files_of, publish, pull, refused

HUB_S_OWN = {".gitattributes", "configuration.json"}


def ours(hub: Any) -> dict[str, bytes]:
    """What the repository holds, but for the hub's own files."""
    return {name: data for name, data in hub.repositories["org/tiny"][-1].items() if name not in HUB_S_OWN}


def test_publish_and_pull(hub: Any, passing_package: Path, tmp_path: Path) -> None:
    sent = publish(passing_package, hub.address)
    assert ours(hub) == files_of(passing_package)
    assert len(hub.repositories["org/tiny"]) == 2, "one commit after the hub's own"
    assert sent["present"] == 0
    got = pull(hub.address, "--output", tmp_path / "got", "--expect", sent["digest"])
    assert files_of(tmp_path / "got") == files_of(passing_package)
    assert got["received"] == sent["sent"]
    assert not hub.private


@pytest.mark.slow
def test_private_and_again(hub: Any, passing_package: Path) -> None:
    publish(passing_package, hub.address, "--private")
    assert hub.private == {"org/tiny"}
    puts = len(hub.puts)
    assert publish(passing_package, hub.address)["sent"] == 0
    assert len(hub.puts) == puts
    assert len(hub.repositories["org/tiny"]) == 2, "no empty commit"


@pytest.mark.slow
def test_a_new_version_is_one_commit_and_old_files_go(hub: Any, passing_package: Path, newer_package: Path) -> None:
    publish(newer_package, hub.address)
    sent = publish(passing_package, hub.address)
    assert ours(hub) == files_of(passing_package)
    assert len(hub.repositories["org/tiny"]) == 3
    assert 0 < sent["sent"] < SMALL_FILES


def test_files_of_somebody_else_are_neither_lost_nor_mixed_in(hub: Any, passing_package: Path) -> None:
    theirs = {"model.safetensors": b"theirs", "README.md": b"# theirs"}
    hub.repositories["org/tiny"] = [theirs]
    assert "do not belong to a package: model.safetensors" in refused("publish", passing_package, hub.address)
    assert hub.repositories["org/tiny"] == [theirs]


@pytest.mark.slow
def test_large_files_of_an_interrupted_run_are_not_sent_again(hub: Any, passing_package: Path) -> None:
    """A killed run leaves large files and no commit."""
    content = (passing_package / LARGEST).read_bytes()
    hub.stored[sha256(content)] = content
    sent = publish(passing_package, hub.address)
    assert sent["present"] == len(content)
    assert sha256(content) not in hub.puts


@pytest.mark.parametrize(("status", "words"), [(403, "may not do this"), (413, "the hub answered 413")])
def test_refusals_do_not_repeat_the_token(hub: Any, passing_package: Path, status: int, words: str) -> None:
    """The fake does, in its answer."""
    hub.refuse = status
    said = refused("publish", passing_package, hub.address)
    assert words in said
    assert hub.token not in said


@pytest.mark.slow
def test_wrong_missing_and_broken_tokens(hub: Any, passing_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hub.variable, "hunter2")
    said = refused("publish", passing_package, hub.address)
    assert hub.variable in said
    assert "hunter2" not in said
    monkeypatch.setenv(hub.variable, "hunter2\n")
    said = refused("publish", passing_package, hub.address)
    assert "without a line end" in said
    assert "hunter2" not in said
    monkeypatch.delenv(hub.variable)
    assert f"export {hub.variable}=" in refused("publish", passing_package, hub.address)
    assert not hub.repositories


def test_a_hub_that_cannot_be_reached(
    hub: Any, passing_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    # how patient the client is does not matter here
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert "cannot be reached (Connection refused)" in refused("publish", passing_package, hub.address)
    assert "cannot be reached (Connection refused)" in refused("pull", hub.address, "--output", tmp_path / "got")


@pytest.mark.slow
def test_content_that_was_changed_there(hub: Any, passing_package: Path, tmp_path: Path) -> None:
    publish(passing_package, hub.address)
    files = hub.repositories["org/tiny"][-1]
    files["tokenizer.json"] += b" "
    said = refused("pull", hub.address, "--output", tmp_path / "got")
    assert "tokenizer.json" in said
    files["tokenizer.json"] = files["tokenizer.json"][:-1]
    files["surplus.py"] = b"import os"
    assert "surplus.py is announced and not in SHA256SUMS" in refused("pull", hub.address, "--output", tmp_path / "got")
    del files["surplus.py"]
    files["../escaped"] = b"x"
    assert "cannot be the name" in refused("pull", hub.address, "--output", tmp_path / "got")
    del files["../escaped"]
    pull(hub.address, "--output", tmp_path / "got")


def test_a_digest_that_is_a_path_is_refused(huggingface: Any, passing_package: Path, tmp_path: Path) -> None:
    """A transfer names the parts of files by their digests."""
    publish(passing_package, huggingface.address)
    victim = tmp_path / "victim"
    victim.write_text("years of work")
    honest = huggingface._entry

    def forged(self: Any, name: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = honest(self, name, data)
        return entry | ({"lfs": {**entry["lfs"], "oid": "../../victim"}} if entry.get("lfs") else {})

    huggingface._entry = forged
    assert "a digest that is none" in refused("pull", huggingface.address, "--output", tmp_path / "got")
    assert victim.read_text() == "years of work"


@pytest.mark.slow
def test_a_whole_forgery_is_refused_by_the_pin(
    hub: Any, passing_package: Path, newer_package: Path, tmp_path: Path
) -> None:
    sent = publish(passing_package, hub.address)
    publish(newer_package, hub.address)
    assert "not the expected" in refused("pull", hub.address, "--output", tmp_path / "got", "--expect", sent["digest"])


def test_no_such_repository(hub: Any, tmp_path: Path) -> None:
    said = refused("pull", hub.address, "--output", tmp_path / "got")
    assert "no such repository" in said


def test_a_revision_is_a_branch(huggingface: Any, passing_package: Path) -> None:
    publish(passing_package, "hf://org/tiny@candidate")
    posted = [path for method, path, _ in huggingface.log if method == "POST"]
    assert "/api/models/org/tiny/branch/candidate" in posted
    assert posted[-1] == "/api/models/org/tiny/commit/candidate"


def test_a_hub_over_http_elsewhere_is_refused(hub: Any, passing_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, "http://192.0.2.1")
    assert "http to 192.0.2.1 is not encrypted" in refused("publish", passing_package, hub.address)


@pytest.mark.slow
def test_large_files_come_from_elsewhere_without_the_token(
    huggingface: Any, passing_package: Path, tmp_path: Path
) -> None:
    publish(passing_package, huggingface.address)
    pull(huggingface.address, "--output", tmp_path / "got")
    elsewhere = [sent for _, path, sent in huggingface.log if path.startswith("/cdn/")]
    assert elsewhere
    assert set(elsewhere) == {None}
