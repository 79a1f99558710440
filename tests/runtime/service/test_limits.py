"""The sliding window and the reader of JSON, alone."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.service.limits import MOST_CLIENTS, RateLimiter, check_token_fields, read_json


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_window_slides() -> None:
    clock = Clock()
    limiter = RateLimiter(3, 3600, clock)
    for _ in range(3):
        assert limiter.admit("a") == 0
        clock.now += 10
    # the first was 30 s ago; it leaves the window 3570 s from now
    assert limiter.admit("a") == 3570
    assert limiter.admit("b") == 0
    clock.now += 3569
    assert limiter.admit("a") == 1
    clock.now += 1
    assert limiter.admit("a") == 0
    # a counter of whole hours would let three more pass here
    assert limiter.admit("a") == 10


@given(st.lists(st.floats(0, 5000), min_size=1, max_size=60))
def test_no_window_holds_more_than_the_limit(gaps: list[float]) -> None:
    clock, passed = Clock(), []
    limiter = RateLimiter(4, 3600, clock)
    for gap in gaps:
        clock.now += gap
        wait = limiter.admit("a")
        if wait == 0:
            passed.append(clock.now)
        else:
            clock.now += wait
            assert limiter.admit("a") == 0, "Retry-After was too short"
            passed.append(clock.now)
    for index, begin in enumerate(passed):
        assert sum(begin <= time < begin + 3600 for time in passed[index:]) <= 4


def test_clients_that_never_come_back_are_forgotten() -> None:
    clock = Clock()
    limiter = RateLimiter(1, 3600, clock)
    for index in range(MOST_CLIENTS * 2):
        clock.now += 1
        assert limiter.admit(str(index)) == 0
    assert len(limiter._times) <= MOST_CLIENTS
    assert limiter.admit(str(MOST_CLIENTS * 2 - 1)) > 0


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b"[" * 65 + b"]" * 65, "nested"),
        (b"[" * 500_000, "nested"),
        (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nested"),
    ],
)
def test_json_that_parsers_disagree_about_is_refused(body: bytes, expected: str) -> None:
    with pytest.raises(RequestError, match=expected):
        read_json(body, 64)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_other_json_is_read_as_it_is(value: object) -> None:
    assert read_json(json.dumps(value).encode(), 64) == value


def test_depth_is_exact() -> None:
    read_json(b"[" * 64 + b"]" * 64, 64)
    with pytest.raises(RequestError, match="64"):
        read_json(b"[" * 65 + b"]" * 65, 64)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_the_cap_names_the_field_as_the_client_wrote_it(name: str) -> None:
    check_token_fields({name: 10}, 10)
    with pytest.raises(RequestError, match=f"{name} is 11, the most is 10") as caught:
        check_token_fields({name: 11}, 10)
    assert caught.value.where == name
