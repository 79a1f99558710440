"""What git's own server says of branches and tags, and what only seems to be that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_onnx.catalog.reference import HubName
from qwen_onnx.errors import SourceError
from qwen_onnx.sources.hub import HubReader
from qwen_onnx.sources.refs import LARGEST, LONGEST_LINE, commit_of, refs_of
from tests.fixtures.fake_server import running
from tests.fixtures.git import GitServer, advertised, commit_in, git, packet
from tests.sources.strange import BOUNDED

ONE, TWO = "1" * 40, "2" * 40
VALID = advertised({"HEAD": ONE, "refs/heads/master": ONE, "refs/tags/v1": TWO, "refs/tags/v1^{}": ONE})
BEGIN = packet("# service=git-upload-pack") + b"0000"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``Org/Tiny.git`` with branches and tags of each kind; others are empty, of SHA-256, or cut off."""
    root = tmp_path_factory.mktemp("repositories")
    for name, more in (("Tiny", []), ("Empty", []), ("Large", ["--object-format=sha256"])):
        git(root, "init", "--quiet", "--initial-branch=master", *more, f"Org/{name}.git")
    for name in ("Tiny", "Large"):
        git(root / f"Org/{name}.git", "commit", "--quiet", "--allow-empty", "--message=one")
    tiny = root / "Org/Tiny.git"
    for arguments in (
        ["tag", "light"],
        ["tag", "--annotate", "--message=x", "v1.0"],
        ["tag", "--annotate", "--message=x", "nested", "v1.0"],
        ["branch", "feature/x"],
        ["branch", "both"],
        ["commit", "--quiet", "--allow-empty", "--message=two"],
        ["tag", "both"],
        ["tag", "same"],
        ["branch", "same"],
    ):
        git(tiny, *arguments)
    git(root, "clone", "--quiet", "--bare", "--depth=1", f"file://{tiny}", "Org/Cut.git")
    return root


@pytest.fixture
def server(repositories: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with running(GitServer, root=repositories) as fake:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{fake.port}")
        yield fake


def asked(repository: str, revision: str) -> str:
    with HubReader(HubName("modelscope", f"Org/{repository}", revision)) as reader:
        return reader.commit()


@pytest.mark.parametrize("name", ["master", "feature/x", "light", "v1.0", "nested", "same"])
def test_a_name_is_the_commit_that_git_says(server: Any, repositories: Path, name: str) -> None:
    assert asked("Tiny", name) == commit_in(repositories / "Org/Tiny.git", name)
    [(method, path, _)] = server.log
    assert (method, path) == ("GET", "/Org/Tiny.git/info/refs?service=git-upload-pack")


def test_the_program_that_servers_run_says_the_same(repositories: Path) -> None:
    tiny = repositories / "Org/Tiny.git"
    said = refs_of(BEGIN + git(tiny, "upload-pack", "--http-backend-info-refs", "."), "x")
    shown = [line.split() for line in git(tiny, "show-ref", "--head", "--dereference").decode().splitlines()]
    assert said == {name: commit for commit, name in shown}


def test_a_repository_that_was_cut_off_and_one_that_is_empty(server: Any, repositories: Path) -> None:
    assert asked("Cut", "master") == commit_in(repositories / "Org/Tiny.git", "master")
    with pytest.raises(SourceError, match="it has no branch or tag 'master'"):
        asked("Empty", "master")


@pytest.mark.parametrize(
    ("repository", "revision", "words"),
    [
        ("Tiny", "v9", "it has no branch or tag 'v9'"),
        ("Tiny", "refs/heads/master", "it has no branch or tag"),
        ("Tiny", "feature", "it has no branch or tag"),
        ("Tiny", "both", "'both' is a branch and a tag, which are different commits"),
        ("Large", "master", "is not a ref of 40 hex digits"),
        ("Nothing", "master", "Org/Nothing@master: no such repository"),
    ],
)
def test_what_a_server_has_not(server: Any, repository: str, revision: str, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        asked(repository, revision)


def test_of_two_commits_one_is_to_be_given(server: Any, repositories: Path) -> None:
    with pytest.raises(SourceError) as caught:
        asked("Tiny", "both")
    for name in ("refs/heads/both", "refs/tags/both"):
        assert commit_in(repositories / "Org/Tiny.git", name) in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not a list of refs"),
        (b"<html>", "no length of a line at byte 0"),
        (BEGIN, "not the whole of one"),
        (BEGIN + packet(f"{ONE} HEAD\0x"), "not the whole of one"),
        (VALID[:-4], "not the whole of one"),
        (VALID[:-5], "cannot have"),
        (VALID + b"00", "no length of a line"),
        (VALID + b"0000", "something follows"),
        (VALID + VALID, "something follows"),
        (VALID.replace(b"upload", b"recive"), "not a list of refs"),
        (VALID[4:], "no length of a line at byte 0"),
        (BEGIN + b"0001" + VALID[len(BEGIN) :], "cannot have 1 bytes"),
        (BEGIN + b"0004" + b"0000", "cannot have 4 bytes"),
        (BEGIN + b"fff1" + b"x" * LONGEST_LINE + b"0000", "cannot have 65,521 bytes"),
        (BEGIN + b"+01f" + b"x" * 50, "no length of a line"),
        (BEGIN + packet(f"{ONE[1:]} HEAD") + b"0000", "is not a ref"),
        (BEGIN + packet(f"{ONE.replace('1', 'G')} HEAD") + b"0000", "is not a ref"),
        (BEGIN + packet(f"{ONE} ") + b"0000", "is not a ref"),
        (BEGIN + packet(f"{ONE} a b") + b"0000", "is not a ref"),
        (advertised({"HEAD": ONE, "a\0b": ONE}), "is not a ref"),
        (BEGIN + 2 * packet(f"{ONE} refs/heads/a") + b"0000", "'refs/heads/a' is there twice"),
        (BEGIN + packet("ERR come back later"), "the git server says: come back later"),
        (packet("ERR no"), "the git server says: no"),
    ],
)
def test_what_only_seems_to_be_a_list(body: bytes, words: str) -> None:
    with pytest.raises(SourceError, match=words) as caught:
        refs_of(body, "modelscope:Org/Tiny")
    assert caught.value.where == "modelscope:Org/Tiny"


def read(body: bytes) -> None:
    """A list is read or refused, and gives commits and nothing else."""
    try:
        found = refs_of(body, "x")
    except SourceError:
        return
    for commit in found.values():
        assert len(commit) == 40
        int(commit, 16)
    for revision in ("master", "v1"):
        if f"refs/heads/{revision}" in found and f"refs/tags/{revision}" not in found:
            assert commit_of(found, revision, "x") == found[f"refs/heads/{revision}"]


@BOUNDED
@given(st.lists(st.tuples(st.integers(0, len(VALID)), st.integers(0, 20), st.binary(max_size=8)), max_size=3))
def test_bytes_that_were_altered(changes: list[tuple[int, int, bytes]]) -> None:
    body = VALID
    for place, count, put in changes:
        body = body[:place] + put + body[place + count :]
    read(body)


@BOUNDED
@given(st.lists(st.binary(max_size=60) | st.sampled_from([f"{ONE} refs/heads/master".encode(), b"ERR x"]), max_size=5))
def test_lines_of_anything(lines: list[bytes]) -> None:
    read(BEGIN + b"".join(b"%04x%s" % (len(line) + 4, line) for line in lines) + b"0000")


@BOUNDED
@given(st.binary(max_size=200))
def test_anything(body: bytes) -> None:
    read(body)


def test_an_answer_without_end_is_cut_off(server: Any) -> None:
    line = packet(f"{ONE} refs/heads/{'x' * 1000}")
    server.answer = lambda self, path, query: self.send(200, BEGIN + line * (LARGEST // len(line) + 1))
    with pytest.raises(SourceError, match="the list of refs is longer than"):
        asked("Tiny", "master")


def test_a_way_that_is_not_encrypted_is_not_gone(server: Any) -> None:
    server.answer = lambda self, path, query: self.send(302, Location="http://192.0.2.1/Org/Tiny.git/info/refs")
    with pytest.raises(SourceError, match=r"http to 192\.0\.2\.1 is not encrypted"):
        asked("Tiny", "master")
