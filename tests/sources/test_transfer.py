"""One download engine: connections that break, servers that lie, content that changes on the way."""

from __future__ import annotations

import hashlib
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.catalog.sources import HubSource
from qwen_onnx.errors import ChecksumError, EnvironmentFault, SourceError
from qwen_onnx.sources.hub import download
from qwen_onnx.sources.remote import CHECKPOINT_FAULTS, Interrupted, RemoteFile
from qwen_onnx.sources.transfer import Transfer
from tests.fixtures.fake_server import Handler, running

CONTENT = random.Random(7).randbytes(3_000_000)
NAME = "model.safetensors"
SOURCE = HubSource(kind="huggingface", repo="org/tiny", revision="0" * 40)
KIB = 1 << 10


class Unsteady(Handler):
    """A hub with one file, which it serves badly.

    Attributes:
        content: what it serves; ``then`` in its place from the second request on.
        cuts: bytes after which the connection breaks, for each request in turn.
        statuses: answers instead of the file, for each request in turn.
        ranges: whether it knows Range; ``chunked`` whether it leaves out the length.
        tags: whether it sends entity tags and keeps to If-Range.
        offsets: where each answer began, ``conditions`` the If-Range of each request.
    """

    content = CONTENT
    then: bytes | None = None
    announced = len(CONTENT)
    cuts: list[int]
    statuses: list[int]
    ranges = True
    chunked = False
    tags = False
    more = b""
    wrong_range = False
    offsets: list[int]
    conditions: list[str | None]

    def answer(self, path: str, query: dict[str, str]) -> None:
        if "/tree/" in path:
            oid = hashlib.sha256(CONTENT).hexdigest()
            entry = {"type": "file", "path": NAME, "size": self.announced, "oid": "0" * 40, "lfs": {"oid": oid}}
            self.send_json([entry])
        elif self.statuses:
            self.send(self.statuses.pop(0), Retry_After="7")
        else:
            self._file()

    def _file(self) -> None:
        kind = type(self)
        data, tag = self.content, hashlib.md5(self.content).hexdigest()
        if self.then is not None:
            kind.content, kind.then = self.then, None
        asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
        self.conditions.append(condition)
        honoured = asked and self.ranges and (not self.tags or condition in (None, f'"{tag}"'))
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and honoured else 0
        self.offsets.append(start)
        body = data[start:] + self.more
        self.send_response(206 if honoured else 200)
        if honoured:
            self.send_header("Content-Range", f"bytes {start + self.wrong_range}-{len(data) - 1}/{len(data)}")
        if self.tags:
            self.send_header("ETag", f'"{tag}"')
        self.send_header(*(("Transfer-Encoding", "chunked") if self.chunked else ("Content-Length", str(len(body)))))
        self.end_headers()
        sent = body[: self.cuts.pop(0)] if self.cuts else body
        if self.chunked:
            sent = b"".join(b"%x\r\n%s\r\n" % (len(sent[i:][:KIB]), sent[i:][:KIB]) for i in range(0, len(sent), KIB))
            sent += b"0\r\n\r\n"
        self.wfile.write(sent)
        self.close_connection = True


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were asked for; none is made."""
    asked: list[float] = []
    monkeypatch.setattr("qwen_onnx.sources.transfer.time.sleep", asked.append)
    return asked


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with running(Unsteady, cuts=[], statuses=[], offsets=[], conditions=[]) as fake:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{fake.port}")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield fake


def got(folder: Path) -> bytes:
    """The file that a download brings."""
    path, files = download(SOURCE, folder, lambda _: None)
    assert files == {NAME: hashlib.sha256(CONTENT).hexdigest()}
    return (path / NAME).read_bytes()


def test_a_download_survives_dropped_connections(hub: Any, waits: list[float], tmp_path: Path) -> None:
    hub.cuts[:] = [700_000, 10, 0, 1_200_000, 300]
    assert got(tmp_path) == CONTENT
    assert hub.offsets == [0, 700_000, 700_010, 700_010, 1_900_010, 1_900_310], (
        "each goes on at the byte where it broke"
    )
    assert waits == [1, 2, 5, 0, 1], "what makes headway does not lose patience"


def test_patience_ends_and_the_next_run_goes_on(hub: Any, waits: list[float], tmp_path: Path) -> None:
    hub.cuts[:] = [500_000, *[0] * 20]
    with pytest.raises(SourceError, match=r"cannot be reached|ended after") as caught:
        got(tmp_path)
    assert "goes on where this one stopped" in (caught.value.hint or "")
    assert waits == [1, 2, 5, 10, 30, 60]
    hub.cuts.clear()
    hub.offsets.clear()
    assert got(tmp_path) == CONTENT
    assert hub.offsets == [500_000]
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_server_that_does_not_know_range(hub: Any, waits: list[float], tmp_path: Path, chunked: bool) -> None:
    hub.ranges, hub.chunked, hub.cuts[:] = False, chunked, [700_000, 900_000]
    assert got(tmp_path) == CONTENT
    assert hub.offsets == [0, 0, 0]
    # a connection that was cut may be found dead before the next request leaves: one wait more
    assert len(waits) in (2, 3)


@pytest.mark.parametrize("tags", [False, True])
def test_content_that_changes_between_attempts_is_not_patched_together(
    hub: Any, waits: list[float], tmp_path: Path, tags: bool
) -> None:
    hub.tags, hub.cuts[:] = tags, [700_000]
    hub.content, hub.then = CONTENT[::-1], CONTENT
    assert got(tmp_path) == CONTENT
    assert hub.offsets[-1] == 0
    assert [condition for condition in hub.conditions if condition] == (
        [f'"{hashlib.md5(CONTENT[::-1]).hexdigest()}"'] if tags else []
    )


def test_a_part_that_does_not_fit_is_fetched_anew(hub: Any, waits: list[float], tmp_path: Path) -> None:
    hub.cuts[:] = [500_000, *[0] * 20]
    with pytest.raises(SourceError):
        got(tmp_path)
    [part] = tmp_path.glob("checkpoints/.*.part/parts/*")
    part.write_bytes(b"x" * 500_000)
    hub.cuts.clear()
    assert got(tmp_path) == CONTENT


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"announced": len(CONTENT) - 1}, "longer than the 2,999,999 bytes announced"),
        ({"announced": len(CONTENT) + 1}, "ended after 3,000,000 of 3,000,001 bytes"),
        ({"chunked": True, "more": b"more"}, "longer than the 3,000,000 bytes announced"),
        ({"more": b"more"}, "longer than the 3,000,000 bytes announced"),
        ({"content": CONTENT[:-1] + b"!"}, "digest other than"),
    ],
)
def test_servers_that_lie(hub: Any, waits: list[float], tmp_path: Path, state: dict[str, Any], words: str) -> None:
    for name, value in state.items():
        setattr(hub, name, value)
    with pytest.raises(ChecksumError, match=words):
        got(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert waits == [], "a lie is not asked for again"


def test_another_range_than_asked_for(hub: Any, waits: list[float], tmp_path: Path) -> None:
    hub.cuts[:], hub.wrong_range = [700_000], True
    with pytest.raises(SourceError, match="another range"):
        got(tmp_path)


def test_a_busy_server_is_asked_again_when_it_says(hub: Any, waits: list[float], tmp_path: Path) -> None:
    hub.statuses[:] = [503, 429]
    assert got(tmp_path) == CONTENT
    assert waits == [7, 7]


def test_a_refusal_is_final(hub: Any, waits: list[float], tmp_path: Path) -> None:
    hub.statuses[:] = [403]
    with pytest.raises(SourceError, match="access denied"):
        got(tmp_path)
    assert waits == []


def test_a_file_that_drips_is_given_up(
    hub: Any, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_onnx.sources.web.PACE_SECONDS", -1.0)
    monkeypatch.setattr("qwen_onnx.sources.web.PACE_BYTES", 1 << 40)
    with pytest.raises(SourceError, match="sends too slowly"):
        got(tmp_path)
    assert len(waits) == 6


def test_a_listing_that_drips_is_given_up(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_onnx.sources.web.DEADLINE", -1.0)
    with pytest.raises(SourceError, match="is not whole after"):
        got(tmp_path)


class Memory:
    """A source without digests, which breaks off once."""

    def __init__(self) -> None:
        self.offsets: list[int] = []

    def read(self, file: RemoteFile, offset: int) -> Any:
        self.offsets.append(offset)

        class Reader:
            def __enter__(self) -> Iterator[bytes]:
                return self.blocks()

            def __exit__(self, *_: object) -> None:
                pass

            def blocks(self, first: bool = len(self.offsets) == 1) -> Iterator[bytes]:
                yield b"old" if first else b"newest"[offset:]
                if first:
                    raise Interrupted(SourceError("broken"))

        return Reader()


def transfer_to(folder: Path, source: Any = None) -> Transfer:
    return Transfer(source or Memory(), "memory", folder / ".x.pull", CHECKPOINT_FAULTS, lambda _: None)


def test_what_cannot_be_compared_begins_anew(waits: list[float], tmp_path: Path) -> None:
    transfer = transfer_to(tmp_path)
    transfer.open(6)
    transfer.fetch(RemoteFile("a", 6))
    assert (transfer.files / "a").read_bytes() == b"newest"
    assert transfer.source.offsets == [0, 0]  # type: ignore[attr-defined]


def test_a_link_in_the_place_of_a_part_is_not_written_through(waits: list[float], tmp_path: Path) -> None:
    victim, digest = tmp_path / "victim", hashlib.sha256(b"newest").hexdigest()
    victim.write_text("years of work")
    for plant in (Path.symlink_to, Path.hardlink_to):
        transfer = transfer_to(tmp_path)
        transfer.open(6)
        plant(transfer.staging / "parts" / digest, victim)
        with pytest.raises(SourceError, match="not ours alone"):
            transfer.fetch(RemoteFile("a", 6, digest), digest)
        assert victim.read_text() == "years of work"
        (transfer.staging / "parts" / digest).unlink()


@pytest.mark.parametrize("which", [".", "parts", "files"])
def test_a_folder_that_others_can_write_into_or_that_is_a_link_is_refused(tmp_path: Path, which: str) -> None:
    transfer = transfer_to(tmp_path)
    transfer.open(6)
    assert stat.S_IMODE(transfer.staging.stat().st_mode) == 0o700
    folder = transfer.staging / which
    folder.chmod(0o777)
    with pytest.raises(SourceError, match="not ours alone"):
        transfer.open(6)
    folder.chmod(0o700)
    transfer.open(6)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match="not ours alone"):
        transfer.open(6)


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transfer = transfer_to(tmp_path)
    transfer.open(6)
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    with pytest.raises(SourceError, match="not ours alone"):
        transfer.open(6)


def test_a_full_disk_is_named(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwen_onnx.sources.transfer._append", full)
    with pytest.raises(EnvironmentFault, match="the disk is full"):
        got(tmp_path)


def test_more_than_the_disk_holds_is_refused_at_once(hub: Any, tmp_path: Path) -> None:
    hub.announced = 1 << 39
    with pytest.raises(EnvironmentFault, match="the disk is full"):
        got(tmp_path)
    assert hub.offsets == []
