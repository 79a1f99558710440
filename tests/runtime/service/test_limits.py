"""The sliding window and the reader of JSON, alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_onnx import bounded
from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.service.budget import Budget
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
@example([3364.0, 0.0, 0.0, 0.0, 0.02])
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


@pytest.mark.slow
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


SMALL = Budget(values=12, ids=6, items=4, members=3, name=5, schema=20, enum=2, text=4, properties=2)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2**33)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.lists(st.integers(0, 9), max_size=8)
        | st.dictionaries(
            st.sampled_from(["prompt", "schema", "parameters", "enum", "const", "title", "a", "b"]), inner
        )
        | st.dictionaries(st.text(max_size=7), inner, max_size=4)
    ),
    max_leaves=20,
)


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**31 for item in value)


def _parts(value: object, field: str = "", part: str = "body") -> Iterator[tuple[str, str, object]]:
    """Every value with its field and the part of a request that it is; token ids of prompts are one value."""
    yield field, part, value
    if isinstance(value, dict):
        for name, inner in value.items():
            inside = part
            if part == "body" and name in ("schema", "parameters") and isinstance(inner, dict):
                inside = "schema"
            elif part == "schema" and name in ("enum", "const"):
                inside = "literal"
            elif part == "schema" and name == "title" and not isinstance(inner, dict):
                inside = "words"
            yield from _parts(inner, field or name, inside)
    elif isinstance(value, list) and not (field == "prompt" and _are_ids(value)):
        for inner in value:
            yield from _parts(inner, field, part)


def _within(value: object, budget: Budget) -> bool:
    parts = list(_parts(value))
    objects = [(item, part) for _, part, item in parts if isinstance(item, dict)]
    prompts = [item for field, _, item in parts if field == "prompt" and _are_ids(item)]
    lists = [item for field, _, item in parts if isinstance(item, list) and not (field == "prompt" and _are_ids(item))]
    enums = [item["enum"] for item, part in objects if part == "schema" and isinstance(item.get("enum"), list)]
    texts = [(len(item), part) for _, part, item in parts if isinstance(item, str) and part != "body"]
    written = sum(part != "body" for _, part, _ in parts) + sum(size for size, _ in texts)
    written += sum(len(name) for item, part in objects if part != "body" for name in item)
    return (
        len(parts) <= budget.values
        and sum(map(len, prompts)) <= budget.ids
        and all(len(item) <= budget.items for item in lists)
        and all(len(item) <= (budget.members if part == "body" else budget.properties) for item, part in objects)
        and all(len(name) <= budget.name for item, _ in objects for name in item)
        and written <= budget.schema
        and all(len(enum) <= budget.enum for enum in enums)
        and all(size <= budget.text for size, part in texts if part != "words")
    )


@pytest.mark.slow
@settings(max_examples=500)
@given(json_values)
@example({"prompt": [1, 2, 3, 4, 5, 6]})
@example({"prompt": [[1, 2, 3], [4, 5, 6, 7]]})
@example({"prompt": [1, 2, 3, 4, True]})
@example({"a": {"schema": {"enum": [1, 2, 3]}}})
@example({"schema": {"enum": 1, "a": {"schema": "0123456789"}}})
@example({"schema": {"title": "012345678", "const": "0123"}})
@example({"schema": {"title": {"title": 1}, "const": {"title": "01234"}}})
@example([[[], [], []], [[], [], []], [[], [], []]])
def test_json_passes_if_and_only_if_it_is_within_the_budget(value: object) -> None:
    body = json.dumps(value).encode()
    if _within(value, SMALL):
        assert read_json(body, 64, SMALL) == value
    else:
        with pytest.raises(RequestError, match="more than"):
            read_json(body, 64, SMALL)


@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:\\1ae', max_size=60).map(str.encode))
def test_no_bytes_raise_anything_else(body: bytes) -> None:
    with contextlib.suppress(RequestError):
        read_json(body, 8, SMALL)


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"[]," * 100_000 + b"[]]",
        b'{"a": [' + b"{}," * 100_000 + b"{}]}",
        b'{"input": [' + b"1," * 1_000_000 + b"1]}",
    ],
)
def test_what_has_too_many_values_is_refused_before_it_is_parsed(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "json", None)
    with pytest.raises(RequestError, match="more than 65536 values"):
        read_json(body, 64)


@pytest.mark.parametrize("text", ["[" * 100_000, ",,{{" * 100_000, '\\",[' * 100_000, '"' * 99_999])
def test_what_stands_in_a_text_is_not_counted(text: str) -> None:
    value = {"messages": [{"role": "user", "content": text}], "prompt": "x"}
    assert read_json(json.dumps(value).encode(), 64) == value
