"""HTTP for downloads, hubs and registries: bounded, encrypted beyond this machine, and silent about secrets."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
from pydantic import SecretStr

from qwen_onnx.errors import QwenOnnxError
from qwen_onnx.sources.hosts import Reach, is_loopback, reach_of
from qwen_onnx.sources.remote import Faults, Interrupted, RemoteFile

# a registry may take a while to store a blob before it answers
TIMEOUT = httpx.Timeout(60.0, connect=10.0)
# an answer that is not a file must be whole after so many seconds
DEADLINE = 60.0
# a file must bring as many bytes in as many seconds, or its connection is given up
PACE_SECONDS, PACE_BYTES = 60.0, 60_000
AGAIN = "the same command goes on where this one stopped"
CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")
# a later attempt may get another answer
PASSING = {408, 425, 429, 500, 502, 503, 504}


def make_client(
    faults: Faults, home: str, *, plain_http: bool = False, hint: str = "use an address that begins with https"
) -> httpx.Client:
    """A client that follows redirects (httpx drops Authorization on the way to another host).

    Args:
        home: URL that is meant; no redirect leads from its host to a nearer one, such as this machine.
        plain_http: allow http to other machines than this one.
        hint: what to do where http is refused.
    """

    def guard(request: httpx.Request) -> None:
        if not plain_http:
            require_encrypted(request.url, hint, faults)
        _refuse_nearer(request.url.host, httpx.URL(home).host, faults)

    # identity: sizes and digests are those of the bytes on the wire
    return httpx.Client(
        timeout=TIMEOUT,
        follow_redirects=True,
        event_hooks={"request": [guard]},
        headers={"Accept-Encoding": "identity", "User-Agent": "qwen-onnx"},
    )


def _refuse_nearer(host: str, home: str, faults: Faults) -> None:
    """A place on the internet has no business with services that only this machine or its network can reach."""
    if host == home or is_loopback(home):
        return
    asked, found = reach_of(home), reach_of(host)
    if found is not None and found < (Reach.FAR if asked is None else asked):
        raise faults.failed(f"it leads to {host}, which is nearer than {home}", where=home, hint="do not use it")


def require_encrypted(url: httpx.URL | str, hint: str, faults: Faults) -> None:
    """Refuse http to another machine than this one: tokens and passwords would be read on the way.

    Raises:
        faults.failed: the URL is not encrypted, or not one.
    """
    try:
        url = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        raise faults.failed("not a URL", hint=hint) from None
    if url.scheme != "https" and not (url.scheme == "http" and is_loopback(url.host)):
        raise faults.failed(f"{url.scheme or 'no scheme'} to {url.host} is not encrypted", hint=hint)


def secret(variable: str, faults: Faults) -> SecretStr | None:
    """What the environment variable holds; None when it is not set or empty.

    Raises:
        faults.failed: it holds what no header takes.
    """
    value = os.environ.get(variable, "")
    return clean(value, variable, faults) if value else None


def clean(value: str, source: str, faults: Faults) -> SecretStr:
    """A secret that a header takes: HTTP libraries print others in their errors, so these must not reach them.

    Raises:
        faults.failed: it holds spaces, a line end or other characters that no header takes.
    """
    if not re.fullmatch(r"[\x21-\x7e]+", value):
        raise faults.failed(
            f"{source} holds a space, a line end or a character that is not ASCII",
            hint=f"set {source} again, without a line end: export {source}=…",
        )
    return SecretStr(value)


@contextmanager
def reaching(where: str, faults: Faults) -> Iterator[None]:
    """Turn what goes wrong on the network into ``faults.failed``, which names the cause.

    The cause is cut off: requests and signed URLs, which may hold secrets, hang on httpx's errors.
    """
    try:
        yield
    except httpx.InvalidURL:
        raise faults.failed("it leads to an address that is none", where=where) from None
    except httpx.HTTPError as error:
        raise unreachable(error, where, faults) from None


@contextmanager
def reading(where: str, faults: Faults) -> Iterator[None]:
    """``reaching`` for the bytes of a file: what another attempt may mend is ``Interrupted``."""
    try:
        with reaching(where, faults):
            try:
                yield
            except (httpx.UnsupportedProtocol, httpx.LocalProtocolError):
                raise
            except httpx.TransportError as error:
                raise Interrupted(unreachable(error, where, faults)) from None
    except httpx.StreamError:
        raise Interrupted(faults.failed("the connection broke", where=where, hint=AGAIN)) from None


def unreachable(error: httpx.HTTPError, where: str, faults: Faults) -> QwenOnnxError:
    """The error for a place that does not answer."""
    cause = f"{type(error).__name__}: {error}" if isinstance(error, httpx.TransportError) else type(error).__name__
    # messages of the transport are the kernel's or TLS', yet some quote an URL
    cause = re.sub(r"\S*://\S*", "…", cause)
    return faults.failed(f"cannot be reached ({cause})", where=where, hint=AGAIN)


def bounded(response: httpx.Response, limit: int, what: str, faults: Faults) -> bytes:
    """The body of a small answer.

    Raises:
        faults.failed: it is longer than ``limit`` bytes, or not whole after ``DEADLINE`` seconds.
    """
    body, end = bytearray(), time.monotonic() + DEADLINE
    for block in response.iter_raw():
        body += block
        if len(body) > limit:
            raise faults.failed(f"{what} is longer than {limit:,} bytes", where=response.url.host)
        if time.monotonic() > end:
            raise faults.failed(f"{what} is not whole after {DEADLINE:.0f} seconds", where=response.url.host)
    return bytes(body)


class Ranges:
    """Asks for the rest of a file and reads the answer, whether or not the server keeps to the range.

    Remembers the entity tag of each file, so that a file that changes between two attempts is not patched together.
    """

    def __init__(self, faults: Faults, clock: Callable[[], float] = time.monotonic) -> None:
        self._faults, self._clock = faults, clock
        self._tags: dict[str, str] = {}

    def headers(self, file: RemoteFile, offset: int) -> dict[str, str]:
        """Of a request for what follows byte ``offset``."""
        if not offset:
            return {}
        tag = self._tags.get(file.place)
        return {"Range": f"bytes={offset}-"} | ({"If-Range": tag} if tag else {})

    def blocks(self, response: httpx.Response, file: RemoteFile, offset: int) -> Iterator[bytes]:
        """The body of an answer, from byte ``offset`` of the file on.

        Raises:
            Interrupted: it broke off, came too slowly, or changed since the last attempt; or the server is busy.
            faults.failed: another range than was asked for.
            faults.altered: another size than announced.
        """
        where = response.url.host
        if response.status_code in PASSING:
            error = self._faults.failed(f"the server answered {response.status_code}", where=where, hint=AGAIN)
            raise Interrupted(error, after=_seconds(response.headers.get("Retry-After", "")))
        self._require_same(response, file)
        whole = response.status_code != httpx.codes.PARTIAL_CONTENT
        total = self._length(response) if whole else self._total(response, offset)
        if total is not None and total > file.size:
            raise self._faults.altered(f"{file.name} is longer than the {file.size:,} bytes announced", where=where)
        if total is not None and total < file.size:
            raise self._faults.altered(f"{file.name} ended after {total:,} of {file.size:,} bytes", where=where)
        return self._paced(response, file, offset, skip=offset if whole else 0)

    def _require_same(self, response: httpx.Response, file: RemoteFile) -> None:
        tag = response.headers.get("ETag", "")
        # a weak one may stand for other bytes
        if not tag.startswith('"'):
            return
        known, self._tags[file.place] = self._tags.get(file.place), tag
        if known and known != tag:
            error = self._faults.altered(f"{file.name} changed while it was read", where=response.url.host)
            raise Interrupted(error, restart=True)

    def _length(self, response: httpx.Response) -> int | None:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise self._faults.failed("a file arrives in another coding than asked for", where=response.url.host)
        length = response.headers.get("Content-Length", "")
        return int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None

    def _total(self, response: httpx.Response, offset: int) -> int | None:
        given = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not given or int(given[1]) != offset:
            raise self._faults.failed(
                "the server answered with another range than was asked for", where=response.url.host
            )
        return None if given[2] == "*" else int(given[2])

    def _paced(self, response: httpx.Response, file: RemoteFile, offset: int, skip: int) -> Iterator[bytes]:
        begin, got, left, where = self._clock(), 0, file.size - offset, response.url.host
        # as they arrive: blocks of a fixed size would be lost, half full, when the connection breaks
        for block in response.iter_raw():
            got += len(block)
            if self._clock() - begin > PACE_SECONDS:
                if got < PACE_BYTES:
                    raise Interrupted(self._faults.failed("the server sends too slowly", where=where, hint=AGAIN))
                begin, got = self._clock(), 0
            fresh = block[skip:] if skip < len(block) else b""
            skip -= len(block) - len(fresh)
            if fresh:
                left -= len(fresh)
                yield fresh
        if left > 0:
            what = f"{file.name} ended after {file.size - left:,} of {file.size:,} bytes"
            raise Interrupted(self._faults.failed(what, where=where, hint=AGAIN))


def _seconds(text: str) -> float:
    """What ``Retry-After`` asks for; a date is not read."""
    return float(text) if re.fullmatch(r"[0-9]{1,4}", text) else 0.0
