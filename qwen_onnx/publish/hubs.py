"""What publishing to Hugging Face Hub and to ModelScope has in common."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import httpx
from pydantic import SecretStr

from qwen_onnx.artifact.checksums import SUMS, read_sums
from qwen_onnx.errors import PublishError
from qwen_onnx.publish.addresses import HubAddress
from qwen_onnx.publish.bundle import Bundle, Item
from qwen_onnx.publish.faults import FAULTS
from qwen_onnx.publish.receive import SMALL
from qwen_onnx.sources.remote import RemoteFile, Source, git_blob_of
from qwen_onnx.sources.web import PASSING, Ranges, make_client, reading

# a hub may write one into a repository that it makes
WELCOME = "README.md"


class HubReader:
    """Files of a hub's repository by their URLs; use it as a context manager, add ``listing``.

    The token goes to the hub's own host, that of the URL ``home``, and is dropped on the way to another.
    """

    def __init__(self, address: HubAddress, token: SecretStr | None, home: str) -> None:
        self._address, self._where, self._token = address, str(address), token
        self._client, self._ranges = make_client(FAULTS, home), Ranges(FAULTS)
        if token:
            self._client.headers["Authorization"] = f"Bearer {token.get_secret_value()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @contextmanager
    def read(self, file: RemoteFile, offset: int) -> Iterator[Iterator[bytes]]:
        """The bytes of ``file`` from ``offset`` on.

        Raises:
            PublishError: the hub refuses.
            Interrupted: the connection broke, or the hub is busy.
        """
        headers = self._ranges.headers(file, offset)
        with reading(self._where, FAULTS), self._client.stream("GET", file.place, headers=headers) as response:
            if response.status_code not in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT, *PASSING):
                raise PublishError(f"the hub answered {response.status_code} for {file.name}", where=self._where)
            yield self._ranges.blocks(response, file, offset)


def obsolete_files(source: Source, remote: dict[str, RemoteFile], bundle: Bundle, where: str) -> list[str]:
    """Files of the repository, ``remote``, that the old package or the hub put there and the new one does not have.

    Raises:
        PublishError: there are files of somebody else; publishing would leave a mixture or lose them.
    """
    surplus = remote.keys() - {item.name for item in bundle.items}
    ours = set(_remote_sums(source, remote[SUMS], where)) if SUMS in remote else {WELCOME}
    foreign = sorted(surplus - ours)
    if foreign:
        shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise PublishError(
            f"the repository holds files that do not belong to a package: {shown}",
            where=where,
            hint="choose another repository, or delete them there",
        )
    return sorted(surplus)


def _remote_sums(source: Source, file: RemoteFile, where: str) -> dict[str, str]:
    if file.size > SMALL:
        raise PublishError(f"{SUMS} there has {file.size:,} bytes", where=where)
    data = bytearray()
    with source.read(file, 0) as blocks:
        for block in blocks:
            data += block
            if len(data) > file.size:
                raise PublishError(f"{SUMS} is longer than announced", where=where)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / SUMS).write_bytes(data)
        return read_sums(Path(folder))


def is_same(item: Item, file: RemoteFile | None) -> bool:
    """Whether the hub's digest of a file is that of ours."""
    if file is None or file.size != item.size:
        return False
    return file.sha256 == item.sha256 if file.sha256 else file.git_blob == git_blob_of(item.path)


def require_same(bundle: Bundle, remote: dict[str, RemoteFile], where: str) -> None:
    """Compare what the hub holds after the commit.

    Raises:
        PublishError: a file is missing, has other bytes, or was added.
    """
    faults = [f"{item.name} is not what was sent" for item in bundle.items if not is_same(item, remote.get(item.name))]
    faults += [f"{name} was added" for name in sorted(remote.keys() - {item.name for item in bundle.items})]
    if faults:
        raise PublishError(f"after the commit: {'; '.join(faults)}", where=where, hint="publish again")


def unreachable(error: BaseException, variable: str, where: str) -> PublishError:
    """The error for a hub that does not answer: the system's own word for it, and not the client's, which quotes URLs.

    Args:
        variable: the environment variable that moves the hub.
    """
    # ModelScope's client keeps it in its text alone
    quoted = re.search(r"\[Errno -?[0-9]+\] ([A-Za-z ]+)", str(error))
    cause, link = quoted[1] if quoted else type(error).__name__, error
    while following := link.__cause__ or link.__context__:
        link = following
        if isinstance(link, OSError) and link.strerror:
            cause = link.strerror
    return PublishError(
        f"the hub cannot be reached ({cause})", where=where, hint=f"go online; {variable} names the hub"
    )


def status_fault(status: int, variable: str, where: str) -> PublishError:
    """The error for a hub's refusal; the hub's own text, which may repeat what it was sent, stays out."""
    causes = {
        401: f"the hub does not take the token in {variable}, or wants one",
        403: f"the token in {variable} may not do this here",
        404: "no such repository or revision, or it is private",
        409: "somebody else is changing the repository",
        412: "somebody else changed the repository in the meantime",
        429: "the hub asks to wait",
    }
    hints = {401: f"export {variable}=…", 403: f"export {variable}=…, one that may write there"}
    what = causes.get(status, f"the hub answered {status}")
    return PublishError(what, where=where, hint=hints.get(status, "the same command goes on where this one stopped"))
