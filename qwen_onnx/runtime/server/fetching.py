"""Pictures from hosts that the operator named (``--fetch-images``); everything about a fetch is bounded.

A client chooses the URL, so the server must not become its way into a network that it cannot reach by itself: only
named hosts, only addresses out in the world, and the connection goes to the very address that was looked at.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

from qwen_onnx.errors import OverloadedError, RequestError
from qwen_onnx.processes.network import Reach, addresses_of, reach_at
from qwen_onnx.runtime.processing.data_uri import INSTEAD

PORTS = {"http": 80, "https": 443}
REDIRECTS = frozenset({301, 302, 303, 307, 308})
PIECE = 64 << 10
Connect = Callable[[str, int, float], socket.socket]


@dataclass(frozen=True)
class FetchLimits:
    """What one request may fetch.

    Args:
        most_bytes: of all its pictures together. seconds: for all of them, host names being looked up apart.
        redirects: of one picture. at_once: requests that fetch at the same time; they hold threads of the server.
    """

    most_bytes: int = 20 << 20
    seconds: float = 10.0
    redirects: int = 3
    at_once: int = 2


def connect_far(host: str, port: int, seconds: float) -> socket.socket:
    """A connection to a host all of whose addresses are out in the world.

    Raises:
        OSError: there is no such host, one of its addresses is private, or nobody answers.
    """
    addresses = addresses_of(host)
    # one private address among others would do for whoever may try again
    if any(reach_at(address) is not Reach.FAR for address in addresses):
        raise OSError("it has a private address")
    return socket.create_connection((addresses[0], port), timeout=seconds)


class Fetcher:
    """Fetches pictures.

    Args:
        hosts: names, with a port where it is not that of the scheme.
        connect: host, port, seconds → socket.
    """

    def __init__(
        self, hosts: Collection[str], limits: FetchLimits = FetchLimits(), connect: Connect = connect_far
    ) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)
        self._limits, self._connect = limits, connect
        self._free = threading.BoundedSemaphore(limits.at_once)

    def fetch(self, urls: Collection[tuple[str, str]]) -> dict[str, bytes]:
        """What is at each URL; given as (where the request has it, URL).

        Raises:
            RequestError: a host that nobody named, or what it gives is too much, too slow or no answer; names the part.
            OverloadedError: others fetch already.
        """
        if not self._free.acquire(blocking=False):
            raise OverloadedError("pictures of other requests are being fetched", hint="try again", retry_after=2)
        try:
            end, left = time.monotonic() + self._limits.seconds, self._limits.most_bytes
            found: dict[str, bytes] = {}
            for where, url in urls:
                found[where] = self._one(url, where, end, left)
                left -= len(found[where])
            return found
        finally:
            self._free.release()

    def _one(self, url: str, where: str, end: float, most: int) -> bytes:
        for _ in range(self._limits.redirects + 1):
            parts = self._allowed(url, where)
            try:
                location, content = self._get(parts, end, most)
            except (OSError, http.client.HTTPException, ValueError) as error:
                told = "it took too long" if time.monotonic() >= end else str(error) or type(error).__name__
                raise RequestError(
                    f"the picture cannot be fetched from {parts.hostname}: {told}", where=where
                ) from error
            if location is None:
                return content
            url = urljoin(url, location)
            if parts.scheme == "https" and url[:6].lower() != "https:":
                raise RequestError(f"{parts.hostname} redirects from https to something else", where=where)
        raise RequestError(f"the picture is redirected more than {self._limits.redirects} times", where=where)

    def _allowed(self, url: str, where: str) -> SplitResult:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise RequestError(f"this is not a URL: {error}", where=where) from error
        name = (parts.hostname or "").lower()
        named = name if port in (None, PORTS.get(parts.scheme)) else f"{name}:{port}"
        if parts.scheme not in PORTS or named not in self._hosts or parts.username is not None:
            raise RequestError(f"pictures are not fetched from {named!r}: {INSTEAD}", where=where)
        return parts

    def _get(self, parts: SplitResult, end: float, most: int) -> tuple[str | None, bytes]:
        """Where it is instead, or what is there. ValueError: another status, too much, or compressed."""
        seconds = end - time.monotonic()
        if seconds <= 0:
            raise OSError("it took too long")
        host, port = str(parts.hostname), parts.port or PORTS[parts.scheme]
        with closing(self._connect(host, port, seconds)) as raw, closing(raw.dup()) as guard:
            # a limit for each read would let a host send one byte at a time for ever
            timer = threading.Timer(max(end - time.monotonic(), 0), _cut, [guard])
            timer.daemon = True
            timer.start()
            try:
                if parts.scheme == "https":
                    with ssl.create_default_context().wrap_socket(raw, server_hostname=host) as secure:
                        return self._exchanged(secure, parts, end, most)
                return self._exchanged(raw, parts, end, most)
            finally:
                timer.cancel()

    def _exchanged(
        self, connected: socket.socket, parts: SplitResult, end: float, most: int
    ) -> tuple[str | None, bytes]:
        connection = http.client.HTTPConnection(parts.netloc)
        connection.sock = connected
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        # nothing of the client's request goes along, and no proxy of the environment is asked
        connection.request("GET", target, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
        answer = connection.getresponse()
        if answer.status in REDIRECTS and answer.headers["Location"]:
            return answer.headers["Location"], b""
        if answer.status != 200:
            raise ValueError(f"it answers with status {answer.status}")
        if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise ValueError("it answers compressed")
        content = bytearray()
        while piece := answer.read(min(PIECE, most + 1 - len(content))):
            content += piece
            if len(content) > most:
                raise ValueError(f"all pictures of a request may have {self._limits.most_bytes:,} bytes together")
        if answer.length or time.monotonic() >= end:
            raise ValueError("the connection ended before the picture did")
        return None, bytes(content)


def _cut(connected: socket.socket) -> None:
    """End a connection under whoever reads it."""
    try:
        connected.shutdown(socket.SHUT_RDWR)
    except OSError:
        # ended by itself meanwhile
        return
