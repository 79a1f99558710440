"""Which commit a branch or a tag is now, as a git server says over HTTP; neither git nor a clone is needed.

The answer to ``GET <repository>/info/refs?service=git-upload-pack`` (gitprotocol-http, version 0) is read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwen_onnx.errors import SourceError
from qwen_onnx.records import COMMIT

QUERY = "info/refs?service=git-upload-pack"
# some servers show a browser's page to whoever does not begin so
AGENT = "git/qwen-onnx"
# bytes of an answer, some 100,000 refs, and of a line with its length
LARGEST, LONGEST_LINE = 8 << 20, 65520
HEAD = b"# service=git-upload-pack"
SHALLOW = re.compile(rb"shallow " + COMMIT.encode())
REF = re.compile(rb"(" + COMMIT.encode() + rb") ([^\0\n ]+)")
# where a repository is empty, the server's abilities need a line to hang on
NOTHING = "capabilities^{}"


def refs_of(body: bytes, where: str) -> dict[str, str]:
    """Read what a server advertises.

    Args:
        where: what messages call the repository.

    Returns:
        Object ids of 40 hex digits by the full names of refs. An annotated tag is there twice, the second time with
        ``^{}`` behind its name and the commit that it names.

    Raises:
        SourceError: the answer is not that of a git server, breaks off, or holds what it may not.
    """
    packets = list(_packets(body, where))
    if refusal := next((line for line in packets if line and line.startswith(b"ERR ")), None):
        raise SourceError(f"the git server says: {refusal[4:204].decode(errors='replace')}", where=where)
    # the depth of a repository that was cut off is no ref
    lines = [line for line in packets[2:-1] if not (line and SHALLOW.fullmatch(line))]
    if packets[:2] != [HEAD, None] or len(packets) < 3 or packets[-1] is not None:
        raise _senseless("it is not a list of refs, or not the whole of one", where)
    found: dict[str, str] = {}
    for index, line in enumerate(lines):
        if line is None:
            raise _senseless("something follows the list of refs", where)
        # the server's abilities follow the first ref
        name, commit = _ref(line.split(b"\0")[0] if index == 0 else line, where)
        if name in found:
            raise _senseless(f"{name!r} is there twice", where)
        found[name] = commit
    found.pop(NOTHING, None)
    return found


def commit_of(refs: dict[str, str], revision: str, where: str) -> str:
    """The commit of a branch or a tag.

    Raises:
        SourceError: there is none of that name, or a branch and a tag that differ.
    """
    tag = refs.get(f"refs/tags/{revision}^{{}}") or refs.get(f"refs/tags/{revision}")
    named = {commit for commit in (tag, refs.get(f"refs/heads/{revision}")) if commit}
    if not named:
        raise SourceError(
            f"no such revision: it has no branch or tag {revision!r}", where=where, hint="give one that its page lists"
        )
    if len(named) > 1:
        raise SourceError(
            f"{revision!r} is a branch and a tag, which are different commits",
            where=where,
            hint=f"give one of the commits: {', '.join(sorted(named))}",
        )
    return named.pop()


def _packets(body: bytes, where: str) -> Iterator[bytes | None]:
    """Lines without their line ends; None for the mark that ends a section."""
    place = 0
    while place < len(body):
        length = body[place : place + 4]
        if not re.fullmatch(rb"[0-9a-fA-F]{4}", length):
            raise _senseless(f"no length of a line at byte {place:,}", where)
        size = int(length, 16)
        if size == 0:
            yield None
            place += 4
            continue
        if not 4 < size <= LONGEST_LINE or place + size > len(body):
            raise _senseless(f"the line at byte {place:,} cannot have {size:,} bytes", where)
        yield body[place + 4 : place + size].removesuffix(b"\n")
        place += size


def _ref(line: bytes, where: str) -> tuple[str, str]:
    found = REF.fullmatch(line)
    if found is None:
        raise _senseless(f"{line[:80]!r} is not a ref of 40 hex digits", where)
    return found[2].decode(errors="backslashreplace"), found[1].decode()


def _senseless(what: str, where: str) -> SourceError:
    return SourceError(f"the git server's answer makes no sense: {what}", where=where, hint="is a proxy in between?")
