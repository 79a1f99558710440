"""Pictures by their URL: from named hosts alone, never from a private network, and never without an end."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwen_onnx.errors import ConfigError, OverloadedError, RequestError
from qwen_onnx.runtime.server.fetching import Connect, Fetcher, FetchLimits, connect_far
from qwen_onnx.runtime.server.settings import ServerSettings

HOST, WHERE = "pictures.example", "messages.0.content.0.image_url"
Answer = Callable[[socket.socket, str], None]


def whole(content: bytes, *head: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}", *head]
    return "\r\n".join([*lines, "", ""]).encode() + content


@contextlib.contextmanager
def host(answer: Answer, context: ssl.SSLContext | None = None) -> Iterator[tuple[Connect, list[str]]]:
    """A server on loopback, the way to it, and what it was asked: heads of requests."""
    asked: list[str] = []

    def serve() -> None:
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:
                return
            # whoever asks may hang up whenever he likes
            with contextlib.suppress(OSError), raw:
                connected = context.wrap_socket(raw, server_side=True) if context else raw
                with connected:
                    head = b""
                    while b"\r\n\r\n" not in head and (piece := connected.recv(4096)):
                        head += piece
                    asked.append(head.decode("latin-1"))
                    answer(connected, asked[-1].split()[1])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield lambda name, number, seconds: socket.create_connection(("127.0.0.1", port), timeout=seconds), asked
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(timeout=10)
    assert not thread.is_alive()


def said(*pieces: bytes, pause: float = 0.0) -> Answer:
    def answer(connected: socket.socket, _: str) -> None:
        for piece in pieces:
            connected.sendall(piece)
            time.sleep(pause)

    return answer


def fetched(answer: Answer, url: str = f"http://{HOST}/a.png?b=c", limits: FetchLimits | None = None) -> bytes:
    with host(answer) as (connect, _):
        return Fetcher([HOST], limits or FetchLimits(), connect).fetch([(WHERE, url)])[WHERE]


def test_a_picture_is_fetched_and_the_host_is_told_nothing_else() -> None:
    with host(said(whole(b"picture"))) as (connect, asked):
        found = Fetcher([HOST.upper()], connect=connect).fetch(
            [(WHERE, f"http://{HOST}/a.png?b=c"), ("x", f"http://{HOST}")]
        )
    assert found == {WHERE: b"picture", "x": b"picture"}
    lines = asked[0].strip().split("\r\n")
    assert lines[0] == "GET /a.png?b=c HTTP/1.1"
    assert {line.split(":")[0] for line in lines[1:]} == {"Host", "Accept", "Accept-Encoding"}
    assert f"Host: {HOST}" in lines


def test_pieces_and_an_answer_that_ends_with_its_connection() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\npic\r\n4\r\nture\r\n0\r\n\r\n"
    assert fetched(said(chunked)) == b"picture"
    assert fetched(said(b"HTTP/1.0 200 OK\r\n\r\npicture")) == b"picture"


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.example/a.png",
        f"http://{HOST}.evil.example/",
        f"http://{HOST}@evil.example/",
        f"http://someone@{HOST}/",
        f"http://{HOST}:8080/",
        f"https://{HOST}:80/",
        f"ftp://{HOST}/",
        f"file://{HOST}/etc/passwd",
        "http:///a.png",
        f"http://{HOST}:x/",
        "http://[::1",
        "http:a.png",
    ],
)
def test_only_named_hosts_are_asked(url: str) -> None:
    def never(*_: object) -> socket.socket:
        raise AssertionError("connected")

    with pytest.raises(RequestError, match=r"not fetched from|not a URL") as fault:
        Fetcher([HOST], connect=never).fetch([(WHERE, url)])
    assert fault.value.where == WHERE


def test_a_port_of_its_own_is_named() -> None:
    with host(said(whole(b"picture"))) as (connect, asked):
        assert Fetcher([f"{HOST}:81"], connect=connect).fetch([(WHERE, f"http://{HOST}:81/")]) == {WHERE: b"picture"}
    assert f"Host: {HOST}:81" in asked[0]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "169.254.169.254",
        "192.168.0.1",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fd00::1",
        "fe80::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "2002:a00:1::1",
    ],
)
def test_private_addresses_are_not_connected_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a public one, too: a name may have both."""

    def found(name: str, *_: object, **__: object) -> list[object]:
        return [(0, 0, 0, "", (one, 0)) for one in ("93.184.215.14", address)]

    def never(*_: object, **__: object) -> socket.socket:
        raise AssertionError("connected")

    monkeypatch.setattr(socket, "getaddrinfo", found)
    monkeypatch.setattr(socket, "create_connection", never)
    with pytest.raises(OSError, match="private address"):
        connect_far(HOST, 80, 1)
    with pytest.raises(RequestError, match=f"cannot be fetched from {HOST}: it has a private address"):
        Fetcher([HOST]).fetch([(WHERE, f"http://{HOST}/")])


def test_the_address_that_was_looked_at_is_the_one_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that points elsewhere at the second look-up (DNS rebinding) gains nothing."""
    asked: list[tuple[str, int]] = []

    def connected(address: tuple[str, int], **_: object) -> socket.socket:
        asked.append(address)
        raise OSError("refused")

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("93.184.215.14", 0))])
    monkeypatch.setattr(socket, "create_connection", connected)
    with pytest.raises(RequestError, match="refused"):
        Fetcher([HOST]).fetch([(WHERE, f"https://{HOST}/")])
    assert asked == [("93.184.215.14", 443)]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (said(whole(b"", status="404 Not Found")), "status 404"),
        (said(whole(b"x", "Content-Encoding: gzip")), "compressed"),
        (said(whole(b"x" * 2000)), "may have 1,000 bytes together"),
        (said(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n" + b"x" * 5000), "1,000 bytes together"),
        (said(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nhalf"), "ended before|IncompleteRead"),
        (said(b"not HTTP\r\n\r\n"), "not HTTP"),
        (said(b""), "closed connection"),
        (said(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000), "header line"),
        (said(whole(b"", "Location: http://evil.example/", status="302 Found")), "not fetched from 'evil.example'"),
        (said(whole(b"", "Location: /again", status="307 Go")), "redirected more than 3 times"),
        (said(whole(b"", status="302 Found")), "status 302"),
        (said(b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 40, pause=0.02), "took too long"),
        (said(b"HTTP/1.1 200 OK\r\n\r\n", *[b"x"] * 40, pause=0.02), "took too long"),
        (said(b"", pause=0.8), "took too long"),
    ],
)
def test_answers_that_are_too_much_too_slow_or_none(answer: Answer, message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(RequestError, match=message) as fault:
        fetched(answer, limits=FetchLimits(most_bytes=1000, seconds=0.3))
    assert fault.value.where == WHERE
    assert time.monotonic() - begin < 20


def test_bytes_count_for_all_pictures_of_a_request() -> None:
    with host(said(whole(b"x" * 600))) as (connect, _):
        fetcher = Fetcher([HOST], FetchLimits(most_bytes=1000), connect)
        with pytest.raises(RequestError, match="1,000 bytes together") as fault:
            fetcher.fetch([("one", f"http://{HOST}/"), ("two", f"http://{HOST}/")])
    assert fault.value.where == "two"


def test_a_redirect_within_the_named_hosts_is_followed() -> None:
    def answer(connected: socket.socket, path: str) -> None:
        found = whole(b"", f"Location: http://{HOST}/there", status="301 Moved") if path == "/" else whole(b"picture")
        connected.sendall(found)

    assert fetched(answer, f"http://{HOST}/") == b"picture"


def test_no_more_than_some_requests_fetch_at_once() -> None:
    waits, goes = threading.Event(), threading.Event()

    def answer(connected: socket.socket, _: str) -> None:
        waits.set()
        goes.wait(10)
        connected.sendall(whole(b"picture"))

    with host(answer) as (connect, _):
        fetcher = Fetcher([HOST], FetchLimits(at_once=1, seconds=60), connect)
        thread = threading.Thread(target=fetcher.fetch, args=[[(WHERE, f"http://{HOST}/")]])
        thread.start()
        assert waits.wait(20)
        with pytest.raises(OverloadedError):
            fetcher.fetch([(WHERE, f"http://{HOST}/")])
        goes.set()
        thread.join()
        assert fetcher.fetch([(WHERE, f"http://{HOST}/")]) == {WHERE: b"picture"}


@pytest.mark.slow
def test_https_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name and by who signed."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on PATH")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN={HOST}"
    options = ["-addext", f"subjectAltName=DNS:{HOST}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *options], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with host(said(whole(b"picture")), context) as (connect, asked):
        fetcher = Fetcher([HOST, "other.example"], connect=connect)
        with pytest.raises(RequestError, match="certificate verify failed"):
            fetcher.fetch([(WHERE, f"https://{HOST}/")])
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with pytest.raises(RequestError, match="Hostname mismatch"):
            fetcher.fetch([(WHERE, "https://other.example/")])
        assert asked == []
        assert fetcher.fetch([(WHERE, f"https://{HOST}/")]) == {WHERE: b"picture"}
    moved = said(whole(b"", f"Location: http://{HOST}/", status="301 Moved"))
    with host(moved, context) as (connect, _), pytest.raises(RequestError, match="redirects from https"):
        Fetcher([HOST], connect=connect).fetch([(WHERE, f"https://{HOST}/")])


@pytest.mark.parametrize("told", ["https://a.example", "a.example/path", "*", "a b", "[::1]", "a.example:http"])
def test_a_host_is_no_url(told: str) -> None:
    with pytest.raises(ConfigError, match="fetch_images"):
        ServerSettings.read({"QWEN_ONNX_FETCH_IMAGES": told})
