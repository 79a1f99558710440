"""A thousand malformed requests: nothing but 4xx, or a closed connection for what is not HTTP; then a good one."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.live import LiveServer
from tests.fixtures.servers import CHAT, exchange, request, statuses

COUNT = 1000
# these take as long as the server's patience, which is half a second here
SLOW_KINDS = 25


@dataclass
class Attack:
    """What goes over a connection."""

    kind: str
    pieces: list[bytes]
    pause: float = 0.0
    half_close: bool = False
    http: bool = True


def valid(rng: random.Random, model: str = "starter") -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": f"hello {rng.random()}"}], "max_tokens": 2}


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def mutated(rng: random.Random) -> Attack:
    """Bytes changed, dropped, doubled; should it still be sound, its model does not exist."""
    content = bytearray(encoded(valid(rng, "nobody")))
    for _ in range(rng.randrange(1, 8)):
        place = rng.randrange(len(content))
        change = rng.randrange(3)
        if change == 0:
            content[place] = rng.randrange(256)
        elif change == 1:
            del content[place : place + rng.randrange(1, 9)]
        else:
            content[place:place] = content[place : place + 9]
    return Attack("mutated", [request(bytes(content))])


def wrong_value(rng: random.Random) -> Attack:
    bad = [None, [], {}, "x", -1, 1e308, 2**70, True, [[]], {"a": {}}, "\ud800", "\x00"]
    value: Any = valid(rng)
    faults = [
        ("messages", rng.choice([None, [], {}, "x", 1, [[]], [None], [{}], [{"role": "user"}], [{"content": "x"}]])),
        ("messages", [{"role": rng.choice(["robot", "", None, 1, "\ud800"]), "content": "x"}]),
        ("messages", [{"role": "user", "content": rng.choice([1, {}, True, [1], [{"type": "image_url"}], "\udfff"])}]),
        ("model", rng.choice([None, 1, [], {}, "nobody", "\ud800", "x" * 5000])),
        ("max_tokens", rng.choice([0, -1, 1.5, "x", [], {}, 2**70, 10**6])),
        ("temperature", rng.choice([-1, 3, "hot", [], 1e308])),
        ("top_p", rng.choice([-1, 2, "x", []])),
        ("stop", rng.choice([1, {}, [1], [""], ["a"] * 50])),
        ("stream", rng.choice(["perhaps", 7, [], {}])),
        ("seed", rng.choice([-1, "x", [], 2**80])),
        (f"unknown{rng.randrange(100)}", rng.choice(bad)),
    ]
    name, wrong = rng.choice(faults)
    return Attack(f"value of {name[:7]}", [request(encoded({**value, name: wrong}))])


def nested(rng: random.Random) -> Attack:
    depth = rng.choice([65, 500, 5000, 100_000])
    opener, closer = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    content = opener * depth + b"1" + closer * (depth if rng.random() < 0.7 else 0)
    if rng.random() < 0.5:
        content = b'{"model": "starter", "messages": ' + content + b"}"
    return Attack("nested", [request(content)])


def number(rng: random.Random) -> Attack:
    digits = b"9" * rng.choice([41, 400, 5000, 100_000])
    wrong = rng.choice([digits, b"-" + digits, b"1e999", b"-1e999", b"NaN", b"Infinity", b"1e", b"0x10", b"01", b"--1"])
    name = rng.choice([b"max_tokens", b"seed", b"temperature", b"top_p", b"n"])
    return Attack("number", [request(encoded(valid(rng))[:-1] + b', "x' + name + b'": ' + wrong + b"}")])


def encoding(rng: random.Random) -> Attack:
    bad = rng.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x28", b"\x80"])
    content = encoded(valid(rng)).replace(b"hello", b"hel" + bad + b"lo")
    if rng.random() < 0.3:
        content = encoded(valid(rng)).decode().encode(rng.choice(["utf-16", "utf-32", "utf-7", "utf-8-sig"]))
        content = content.replace(b"starter", b"nobody")
    return Attack("encoding", [request(content)])


def surrogates(rng: random.Random) -> Attack:
    text = rng.choice(["\ud800", "\udfff", "a\udc00b", "\ud800\ud800"])
    value = valid(rng)
    value["messages"] = [{"role": "user", "content": rng.choice([text, [{"type": "text", "text": text}]])}]
    return Attack("surrogates", [request(encoded(value))])


def content_type(rng: random.Random) -> Attack:
    kinds = [b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data", b"application/xml", b"", b";"]
    head = b"Content-Type: " + rng.choice(kinds) + b"\r\n"
    return Attack("content type", [request(encoded(valid(rng)), head=head)])


def duplicate(rng: random.Random) -> Attack:
    name = rng.choice(["model", "messages", "max_tokens"])
    content = encoded(valid(rng))[:-1] + f', "{name}": {json.dumps(valid(rng)[name])}}}'.encode()
    return Attack("duplicate key", [request(content)])


def method_or_path(rng: random.Random) -> Attack:
    content = encoded(valid(rng))
    if rng.random() < 0.5:
        method = rng.choice(["GET", "PUT", "DELETE", "PATCH", "BREW", "TRACE", "OPTIONS", "CONNECT", "post"])
        return Attack("method", [request(content, method=method)])
    paths = ["/v1", "/v1/", "//v1/chat/completions", "/v1/chat/completions/x", "/../../etc/passwd", "/static/../app.py"]
    paths += ["/v1/%00", "/%ff%fe", "/static/%2e%2e%2fserver.py", "/" + "x" * 20_000, "/v2/chat/completions", "/health"]
    return Attack("path", [request(content, path=rng.choice(paths))])


def header(rng: random.Random) -> Attack:
    content = encoded(valid(rng, "nobody"))
    heads = [
        b"X-Long: " + b"x" * 200_000 + b"\r\n",
        b"".join(b"X-%d: y\r\n" % index for index in range(20_000)),
        b"X-Nul: a\x00b\r\n",
        b"No colon\r\n",
        b": no name\r\n",
        b"Host: other.example\r\n",
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Authorization: Bearer " + b"k" * 9000 + b"\r\n",
        b"X-Bytes: \xff\xfe\x80\r\n",
        b"Expect: 200-impossible\r\n",
        b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n",
    ]
    return Attack("header", [request(content, head=rng.choice(heads))], half_close=rng.random() < 0.5)


def length(rng: random.Random) -> Attack:
    sent = request(encoded(valid(rng, "nobody")))
    wrong = rng.choice([b"-1", b"abc", b"1e3", b"", b"99999999999999999999999", b"5000000", b"0x10", b"3"])
    head, _, rest = sent.partition(b"Content-Length: ")
    return Attack("length", [head + b"Content-Length: " + wrong + rest[rest.index(b"\r\n") :]])


def chunks(rng: random.Random) -> Attack:
    head = b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    bad = rng.choice([b"zz\r\n", b"-5\r\nhello\r\n", b"5\r\nhel", b"FFFFFFFFFFFFFFFFFFFF\r\n", b"5;" + b"x" * 90_000])
    if rng.random() < 0.1:
        return Attack("too large", [head, *[b"10000\r\n" + b" " * 65536 + b"\r\n"] * 80, b"0\r\n\r\n"])
    return Attack("chunks", [head, bad], half_close=rng.random() < 0.5)


def half_closed(rng: random.Random) -> Attack:
    sent = request(encoded(valid(rng)))
    return Attack("half closed", [sent[: rng.randrange(1, len(sent))]], half_close=True, http=False)


def pipelined(rng: random.Random) -> Attack:
    first = request(b"", method="GET", path="/none").replace(b"Connection: close\r\n", b"")
    return Attack("pipelined", [first * rng.randrange(1, 9) + rng.randbytes(rng.randrange(1, 300))], half_close=True)


def no_http(rng: random.Random) -> Attack:
    hello = bytes.fromhex("16030100c8010000c4030300") + rng.randbytes(60)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    noise = [rng.randbytes(rng.randrange(1, 2000)), hello, preface, b"\r\n" * 50, b"GET\r\n\r\n", b"\x00" * 100_000]
    noise += [b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"HELO me\r\n", b"A" * 200_000]
    return Attack("no HTTP", [rng.choice(noise)], half_close=True, http=False)


def slow(rng: random.Random) -> Attack:
    sent = request(encoded(valid(rng)))
    end = rng.choice([20, len(sent) - 5])
    drops = [bytes([byte]) for byte in sent[end - 12 : end]]
    return Attack("slow", [sent[: end - 12], *drops], pause=0.1, http=end != 20)


QUICK: list[Callable[[random.Random], Attack]] = [
    mutated, wrong_value, nested, number, encoding, surrogates, content_type, duplicate, method_or_path, header, length,
    chunks, half_closed, pipelined, no_http,
]  # fmt: skip


def attacks() -> list[Attack]:
    rng = random.Random(4)
    made = [slow(rng) for _ in range(SLOW_KINDS)]
    return made + [QUICK[index % len(QUICK)](rng) for index in range(COUNT - SLOW_KINDS)]


@pytest.mark.slow
def test_a_thousand_malformed_requests(tiny_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_ONNX_HEADER_SECONDS", "0.5")
    monkeypatch.setenv("QWEN_ONNX_BODY_SECONDS", "0.5")
    # on loopback too much is no fault; with a limit it is
    monkeypatch.setenv("QWEN_ONNX_MAX_TOKENS", "1024")
    with LiveServer("qwen_onnx.cli.app", ["serve", str(tiny_build), "--threads", "1"]) as server:

        def run(attack: Attack) -> tuple[Attack, list[int] | None]:
            try:
                return attack, statuses(
                    exchange(server.port, attack.pieces, pause=attack.pause, half_close=attack.half_close)
                )
            except TimeoutError:
                return attack, None

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(run, attacks()))
        good = httpx.post(f"{server.url}{CHAT}", json=valid(random.Random(0), server.model), trust_env=False)
        assert good.status_code == 200, good.text
        log = server.log()
    wrong = [
        (attack.kind, codes, b"".join(attack.pieces)[:300])
        for attack, codes in results
        if codes is None or any(not 400 <= code < 500 for code in codes)
    ]
    assert not wrong, wrong[:5]
    silent = Counter(attack.kind for attack, codes in results if attack.http and not attack.half_close and not codes)
    assert not silent, f"closed without an answer: {silent}"
    assert len({attack.kind for attack, _ in results}) > 15
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    told = [line["status"] for line in lines if line.get("logger") == "qwen_onnx.request"]
    assert len(told) > COUNT / 2
    assert max(told) < 500
    assert not [line for line in lines if line["level"] == "ERROR"]
