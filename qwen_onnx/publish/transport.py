"""HTTP for downloads and registries: bounded, encrypted beyond this machine, and silent about secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from qwen_onnx.errors import PublishError
from qwen_onnx.processes.network import is_loopback

# a registry may take a while to store a blob before it answers
TIMEOUT = httpx.Timeout(60.0, connect=10.0)


def make_client(*, plain_http: bool) -> httpx.Client:
    """A client that follows redirects (httpx drops Authorization on the way to another host).

    Args:
        plain_http: allow http to other machines than this one.
    """

    def guard(request: httpx.Request) -> None:
        if not plain_http:
            require_encrypted(request.url, "--plain-http allows it for a registry, where you trust the network")

    # identity: sizes and digests are those of the bytes on the wire
    return httpx.Client(
        timeout=TIMEOUT,
        follow_redirects=True,
        event_hooks={"request": [guard]},
        headers={"Accept-Encoding": "identity", "User-Agent": "qwen-onnx"},
    )


def require_encrypted(url: httpx.URL | str, hint: str) -> None:
    """PublishError for http to another machine than this one: tokens and passwords would be read on the way."""
    url = httpx.URL(url)
    if url.scheme != "https" and not is_loopback(url.host):
        raise PublishError(f"{url.scheme or 'no scheme'} to {url.host} is not encrypted", hint=hint)


@contextmanager
def reaching(where: str) -> Iterator[None]:
    """Turn what goes wrong on the network into a PublishError that names the cause.

    The cause is cut off: requests and signed URLs, which may hold secrets, hang on httpx's errors.
    """
    try:
        yield
    except httpx.HTTPError as error:
        cause = f"{type(error).__name__}: {error}" if isinstance(error, httpx.TransportError) else type(error).__name__
        # messages of the transport are the kernel's or TLS', yet some quote an URL
        cause = re.sub(r"\S*://\S*", "…", cause)
        raise PublishError(
            f"cannot be reached ({cause})", where=where, hint="the same command goes on where this one stopped"
        ) from None


def bounded(response: httpx.Response, limit: int, what: str) -> bytes:
    """The body of a small answer.

    Raises:
        PublishError: it is longer than ``limit`` bytes, or does not end.
    """
    body = bytearray()
    for block in response.iter_raw():
        body += block
        if len(body) > limit:
            raise PublishError(f"{what} is longer than {limit:,} bytes", where=response.url.host)
    return bytes(body)


def blocks_from(response: httpx.Response, offset: int) -> Iterator[bytes]:
    """The body from byte ``offset`` on, whether or not the server kept to the Range that it was asked for.

    Raises:
        PublishError: it answered with another range.
    """
    skip = offset
    if response.status_code == httpx.codes.PARTIAL_CONTENT:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            raise PublishError("the server answered with another range than asked for", where=response.url.host)
        skip = 0
    # as they arrive: blocks of a fixed size would be lost, half full, when the connection breaks
    for block in response.iter_raw():
        if skip >= len(block):
            skip -= len(block)
            continue
        yield block[skip:] if skip else block
        skip = 0


def range_header(offset: int) -> dict[str, str]:
    """Ask for the rest of a body."""
    return {"Range": f"bytes={offset}-"} if offset else {}
