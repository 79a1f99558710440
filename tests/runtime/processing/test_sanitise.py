"""However a text is cut, the same is removed, and nothing that a browser would run is left."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_onnx.runtime.processing.sanitise import Sanitiser, sanitised

FRAGMENTS = [
    "<script>", "</script>", "<script src=x>", "</script >", "<SCRIPT\n", "<iframe ", "</iframe>", "<scr", "ipt>",
    "javascript:", "java", "script:", "java\nscript:", "vbscript:", "data:", "data:text/html,", "data:;base64,",
    ";base64", "text/html", ",", "<", ">", "/", "d", "j", " ", "\n", "a", "alert(1)", "the data: 1, 2", "[removed]",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join) | st.text(max_size=40)
LEFT = re.compile(r"<(script|iframe)[\s/>]|(java|vb)script:|data:([a-z]+/[a-z]+)?(;[^,;\s\"'<>]*)*,", re.IGNORECASE)


def pieces(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(bounds)]


@settings(max_examples=400)
@given(TEXTS, st.lists(st.integers(0, 1000), max_size=8))
def test_any_split_gives_the_same(text: str, cuts: list[int]) -> None:
    sanitiser = Sanitiser()
    joined = "".join(sanitiser.push(piece) for piece in pieces(text, cuts)) + sanitiser.flush()
    assert joined == sanitised(text)


@settings(max_examples=400)
@given(TEXTS)
def test_nothing_that_runs_is_left_even_pieced_together(text: str) -> None:
    assert not LEFT.search(sanitised(text))


@settings(max_examples=200)
@given(TEXTS)
def test_nothing_is_told_before_it_is_certain(text: str) -> None:
    sanitiser, whole, told = Sanitiser(), sanitised(text), ""
    for character in text:
        told += sanitiser.push(character)
        assert whole.startswith(told)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a<script>alert(1)</script>b", "a[removed]b"),
        ("a<ScRiPt src='x'>y</sCrIpT foo >b", "a[removed]b"),
        ("a<script>never ends", "a[removed]"),
        ("data:;base64javascript:", "data:;base64[removed]"),
        ("data:;a<script", "data:;a[removed]"),
        ("a<script", "a[removed]"),
        ("<iframe src='//x'></iframe>!", "[removed]!"),
        ("[x](javascript:alert(1))", "[x]([removed]alert(1))"),
        ("[x](java\nscript:alert(1))", "[x]([removed]alert(1))"),
        ("<img src='data:image/svg+xml;base64,PHN2Zz4='>", "<img src='[removed]'>"),
        ("<scr<script></script>ipt>x", "<scr[removed]ipt>x"),
        ("data:;javascript: x", "data:;[removed] x"),
    ],
)
def test_what_is_removed(text: str, expected: str) -> None:
    assert sanitised(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "here is the data: 1, 2 and 3",
        "data:\n- a\n- b",
        "<scripture>",
        "a < b, c > d",
        "JavaScript is a language",
        "data",
        "<",
        "j",
    ],
)
def test_what_is_left_alone(text: str) -> None:
    assert sanitised(text) == text


def test_messages_are_filtered_in_every_place() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "<script>x</script>"}], "tool_calls": None}
    assert sanitised([message])[0]["content"][0]["text"] == "[removed]"
