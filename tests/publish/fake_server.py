"""What the faked registries and hubs share: an HTTP server of a thread, whose handler is made for one test."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

BLOCK = 1 << 16


class Handler(BaseHTTPRequestHandler):
    """Reads bodies of both framings and keeps a log of (method, path, Authorization)."""

    protocol_version = "HTTP/1.1"
    log: list[tuple[str, str, str | None]]

    def do_GET(self) -> None:
        self.log.append((self.command, self.path, self.headers.get("Authorization")))
        url = urlsplit(self.path)
        self.answer(url.path, {key: values[0] for key, values in parse_qs(url.query).items()})

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def answer(self, path: str, query: dict[str, str]) -> None:
        """Answer one request."""
        raise NotImplementedError

    def blocks(self) -> Iterator[bytes]:
        """The request's body."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            left = int(self.headers.get("Content-Length") or 0)
            while left:
                block = self.rfile.read(min(left, BLOCK))
                if not block:
                    raise ConnectionError("the client went away")
                left -= len(block)
                yield block

    def body(self) -> bytes:
        return b"".join(self.blocks())

    def send(self, status: int, data: bytes = b"", **headers: str) -> None:
        """An answer; a HEAD gets the headers alone. ``_`` in a header's name stands for ``-``."""
        self.send_response(status)
        named = {"Content-Length": str(len(data))} | {key.replace("_", "-"): value for key, value in headers.items()}
        for name, value in named.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_ranged(self, data: bytes, **headers: str) -> None:
        """A body, or the part of it that a Range header asks for."""
        asked = self.headers.get("Range")
        if asked:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            rest = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            self.send(206, data[start:], **headers, **rest)
        else:
            self.send(200, data, **headers)

    def send_json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.send(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def log_message(self, *_: object) -> None:
        """Quiet."""


class QuietServer(ThreadingHTTPServer):
    """Clients that were killed are no news."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def running(kind: type[Handler], **state: Any) -> Iterator[Any]:
    """A class of its own with ``state``, served at ``kind.port``."""
    handler: Any = type(kind.__name__, (kind,), {"log": [], **state})
    server = QuietServer(("127.0.0.1", 0), handler)
    handler.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield handler
    server.shutdown()
    server.server_close()
