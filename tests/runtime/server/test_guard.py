"""What stands before the API: keys, rates, hosts, origins, bodies, time; on real sockets."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from qwen_onnx.runtime.server.keys import KeyRing, digest_of
from qwen_onnx.runtime.server.settings import ServerSettings
from tests.fixtures.servers import CHAT, Guarded, body, exchange, guarded, request, statuses, until

ALICE, BOB = "qo-alice-0123456789", "qo-bob-0123456789"
KEYS = KeyRing({digest_of(ALICE): "alice", digest_of(BOB): "bob"})
SETTINGS = ServerSettings(
    rate_limit=6,
    max_input_characters=100,
    max_tokens=50,
    max_body_bytes=20_000,
    header_seconds=0.5,
    body_seconds=0.5,
    cors_origins=("https://page.example",),
)


@pytest.fixture(scope="module")
def keyed(tiny_artifact: Path) -> Iterator[Guarded]:
    with guarded(tiny_artifact, SETTINGS, keys=KEYS) as running:
        yield running


@pytest.fixture(scope="module")
def plain(tiny_artifact: Path) -> Iterator[Guarded]:
    settings = SETTINGS.model_copy(update={"rate_limit": None, "cors_origins": ()})
    with guarded(tiny_artifact, settings, options={"streams": 1, "queue_size": 1}) as running:
        yield running


def error_of(answer: httpx.Response) -> dict[str, str]:
    told: dict[str, str] = answer.json()["error"]
    assert set(told) == {"message", "type", "param", "code"}
    return told


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer nonsense", f"Basic {ALICE}", ALICE, f"Bearer {ALICE}x"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/docs", "/openapi.json", "/none", "/health", "/static"])
def test_without_a_key_everything_but_probes_and_page_is_shut(keyed: Guarded, header: str, path: str) -> None:
    answer = keyed.http.get(path, headers={"authorization": header} if header else {})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert error_of(answer)["code"] == "invalid_api_key"


def test_probes_and_page_are_open(keyed: Guarded) -> None:
    for path in ("/health/live", "/health/ready", "/", "/static/app.js"):
        assert keyed.http.get(path).status_code == 200, path
    page = keyed.http.get("/").headers
    assert "script-src 'self'" in page["content-security-policy"]
    assert page["x-content-type-options"] == "nosniff"


def test_with_a_key_everything_opens(keyed: Guarded) -> None:
    for path in ("/v1/models", "/metrics", "/docs", "/openapi.json"):
        assert keyed.http.get(path, headers={"authorization": f"bearer {ALICE}"}).status_code == 200, path


@pytest.mark.slow
def test_each_key_has_a_limit_of_its_own(tiny_artifact: Path) -> None:
    with guarded(tiny_artifact, SETTINGS.model_copy(update={"rate_limit": 2}), keys=KEYS) as keyed:
        assert [keyed.ask(ALICE).status_code for _ in range(3)] == [200, 200, 429]
        refused = keyed.ask(ALICE)
        assert 3590 <= int(refused.headers["retry-after"]) <= 3600
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        other = keyed.ask(BOB)
        assert (other.status_code, other.headers["x-ratelimit-remaining-requests"]) == (200, "1")
        # looking costs nothing
        assert keyed.http.get("/v1/models", headers={"authorization": f"Bearer {ALICE}"}).status_code == 200
        client = OpenAI(base_url=f"{keyed.http.base_url}/v1", api_key=ALICE, max_retries=0)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**body())


def test_a_page_elsewhere_gets_no_answer_unless_its_origin_is_named(keyed: Guarded, plain: Guarded) -> None:
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    good = keyed.http.options(CHAT, headers={"origin": "https://page.example", **ask})
    assert good.headers["access-control-allow-origin"] == "https://page.example"
    for server, origin in ((keyed, "https://evil.example"), (plain, "https://page.example")):
        answer = server.http.options(CHAT, headers={"origin": origin, **ask})
        assert "access-control-allow-origin" not in answer.headers
        assert answer.status_code >= 400


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1", 200), ("localhost:8000", 200), ("[::1]:80", 200), ("evil.example", 421), ("127.0.0.1.evil", 421)],
)
def test_a_name_that_points_here_is_not_enough(plain: Guarded, host: str, status: int) -> None:
    assert plain.http.get("/v1/models", headers={"host": host}).status_code == status


def test_input_and_tokens_are_limited(plain: Guarded) -> None:
    for changes, words in (
        ({"messages": [{"role": "user", "content": "x" * 101}]}, "101 characters, the most is 100"),
        ({"messages": [{"role": "system", "content": "x" * 60}, {"role": "user", "content": "x" * 60}]}, "characters"),
        ({"max_tokens": 51}, "max_tokens is 51, the most is 50"),
        ({"max_tokens": None, "max_completion_tokens": 51}, "max_completion_tokens is 51"),
        ({"max_tokens": 10**50}, "digits"),
    ):
        for stream in (False, True):
            answer = plain.ask(**changes, stream=stream)
            assert answer.status_code == 400
            assert words in error_of(answer)["message"]
    whole = plain.ask(max_tokens=None)
    assert whole.status_code == 200
    assert whole.json()["usage"]["completion_tokens"] <= 50


def chunked(content: bytes, size: int) -> list[bytes]:
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    )
    pieces = [content[index : index + size] for index in range(0, len(content), size)]
    return [f"{head}\r\n".encode(), *(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces), b"0\r\n\r\n"]


@pytest.mark.slow
def test_a_body_is_counted_while_it_comes(plain: Guarded) -> None:
    received = exchange(plain.port, chunked(b" " * 30_000, 1000))
    assert statuses(received) == [413]
    assert statuses(exchange(plain.port, [request(b" " * 30_000)])) == [413]
    assert statuses(exchange(plain.port, [request(b"", length=10**15)])) == [413]
    small = json.dumps(body()).encode()
    assert statuses(exchange(plain.port, [*chunked(small, 7)[:-1], b"0\r\n\r\n"], patience=20)) == [200]


@pytest.mark.slow
def test_slow_clients_are_let_go(plain: Guarded) -> None:
    content = json.dumps(body()).encode()
    head = request(content)[: -len(content)]
    # a byte every 0.2 s: with a limit of idle time alone it would go on for long
    assert exchange(plain.port, [bytes([byte]) for byte in head[:20]], pause=0.2) == b""
    assert statuses(exchange(plain.port, [head, *(bytes([byte]) for byte in content[:20])], pause=0.2)) == [408]
    assert exchange(plain.port, [], pause=0) == b""
    first = request(b"", path="/none", method="GET").replace(b"Connection: close\r\n", b"")
    received = exchange(plain.port, [first, *(bytes([byte]) for byte in head[:20])], pause=0.2)
    assert statuses(received) == [404]


def test_request_ids_are_echoed_when_they_can_do_no_harm(plain: Guarded) -> None:
    assert plain.http.get("/none", headers={"x-request-id": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
    for bad in ("", "a b", "x" * 65, "a\tb"):
        made = plain.http.get("/none", headers={"x-request-id": bad}).headers["x-request-id"]
        assert len(made) == 32


def test_overload_is_told_and_passes(plain: Guarded) -> None:

    seen: list[httpx.Response] = []

    # more at once than a stream and a place in the queue: some must be refused, all must be told
    def ask(stream: bool) -> None:
        seen.append(plain.ask(max_tokens=50, stream=stream))

    threads = [threading.Thread(target=ask, args=(index % 2 == 0,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [answer for answer in seen if answer.status_code != 200]
    assert {answer.status_code for answer in refused} == {503}
    assert len(refused) < len(seen)
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert error_of(answer)["type"] == "overloaded_error"
    assert plain.ask().status_code == 200
    assert 'qwen_onnx_rejects_total{reason="overloaded"}' in plain.http.get("/metrics").text


def test_the_metrics_follow(plain: Guarded) -> None:
    def value(name: str) -> float:
        lines = plain.http.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), 0.0)

    names = ["qwen_onnx_time_to_first_token_seconds_count", "qwen_onnx_generation_seconds_count"]
    route = 'qwen_onnx_http_requests_total{route="/v1/chat/completions",status="200"}'
    before = [value(name) for name in (*names, route)]
    tokens = value("qwen_onnx_generated_tokens_total")
    assert plain.ask(max_tokens=4).status_code == 200
    assert [value(name) for name in (*names, route)] == [count + 1 for count in before]
    until(lambda: value("qwen_onnx_generated_tokens_total") > tokens)
    assert value('qwen_onnx_resident_bytes{process="worker"}') > 10e6
    assert value("qwen_onnx_kv_capacity_tokens") > 0
    assert value("qwen_onnx_kv_token_bytes") == 512


def test_readiness_tells_its_checks(plain: Guarded) -> None:
    told = plain.http.get("/health/ready").json()
    assert told["status"] in ("healthy", "degraded")
    assert {check["name"] for check in told["checks"]} == {"response_time", "memory_growth", "speed", "worker", "queue"}


@pytest.mark.slow
def test_a_key_learns_nothing_of_what_another_has_asked(tiny_artifact: Path) -> None:
    """``cached_tokens`` would tell a prompt token by token to whoever guesses."""
    settings = ServerSettings(rate_limit=100)

    def cached(server: Guarded, key: str | None, text: str) -> int:
        answer = server.ask(key, messages=[{"role": "user", "content": text}])
        found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    secret = "the code of the safe is 493817, tell nobody"
    with guarded(tiny_artifact, settings, keys=KEYS) as keyed:
        assert cached(keyed, ALICE, secret) == 0
        assert cached(keyed, BOB, secret) == 0
        assert cached(keyed, ALICE, secret) > len(secret)
    with guarded(tiny_artifact, settings) as open_to_all:
        assert [cached(open_to_all, None, secret) > 0 for _ in range(2)] == [False, True]
