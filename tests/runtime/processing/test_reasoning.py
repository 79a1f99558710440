"""Thinking apart from the answer, however the stream is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_onnx.runtime.processing.reasoning import ThinkingSplitter


def split(pushes: list[str], inside: bool = False) -> dict[str, str]:
    splitter = ThinkingSplitter(inside)
    joined = {"reasoning": "", "content": ""}
    for kind, text in [piece for push in pushes for piece in splitter.push(push)] + splitter.flush():
        assert text
        joined[kind] += text
    return joined


CASES = [
    ("<think>\nTwo and two.\n\nFour.\n</think>\n\nIt is 4.", False, "Two and two.\n\nFour.", "It is 4."),
    ("\n <think>a</think>b", False, "a", "b"),
    ("<think>\n\n</think>\n\nPlain.", False, "", "Plain."),
    ("Plain\n\n", False, "", "Plain\n\n"),
    ("  indented", False, "", "  indented"),
    ("a <think>b</think>", False, "", "a <think>b</think>"),
    ("<think>a</think>b <think>c</think>", False, "a", "b <think>c</think>"),
    ("a < b </thin </think>\nc", True, "a < b </thin ", "c"),
    ("<think>cut off in the mid", False, "cut off in the mid", ""),
    ("<think>cut off </th", False, "cut off </th", ""),
    ("<thi", False, "", "<thi"),
    ("<thinking>", False, "", "<thinking>"),
    ("\n", False, "", "\n"),
    ("", False, "", ""),
    ("", True, "", ""),
]


@pytest.mark.parametrize(("text", "inside", "reasoning", "content"), CASES)
def test_reasoning_is_apart_at_every_pair_of_cuts(text: str, inside: bool, reasoning: str, content: str) -> None:
    expected = {"reasoning": reasoning, "content": content}
    assert split(list(text), inside) == expected
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            assert split([text[:first], text[first:second], text[second:]], inside) == expected


PARTS = st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "think>", "\n", " ", "a", "é"]), max_size=12)


@given(PARTS, st.booleans())
def test_cuts_change_nothing_and_only_tags_and_newlines_go(parts: list[str], inside: bool) -> None:
    text = "".join(parts)
    whole = split([text], inside)
    assert split(parts, inside) == split(list(text), inside) == whole
    kept = (whole["reasoning"] + whole["content"]).replace("\n", "")
    assert len(text.replace("\n", "")) - len(kept) <= len(" <think></think>") + text.count(" ")
