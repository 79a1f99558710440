"""The parser of tool calls: pure text in, events out."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_onnx.runtime.processing.tool_calls import CallArguments, CallEvent, CallStart, Text, ToolCallParser

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": "}</tool_call>\\""}]}}\n</tool_call>'
SHORT = '<tool_call>{"name":"g","arguments":{}}</tool_call>'
SWAPPED = '<tool_call>\n{"arguments": {"a": 1}, "name": "f"}\n</tool_call>'
MALFORMED = [
    "<tool_call>\nf(1)\n</tool_call>",
    '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
    '<tool_call>\n{"name": "f"}\n</tool_call>',
    '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
    '<tool_call>\n{"name": "f", "arguments": "x"}\n</tool_call>',
    '<tool_call>\n{"name": ["f"], "arguments": {}}\n</tool_call>',
    '<tool_call>\n{"name" "f"}\n</tool_call>',
    "<tool_call>\n{</tool_call>",
    "<tool_call></tool_call>",
]
FRAGMENTS = [
    CALL,
    SHORT,
    SWAPPED,
    *MALFORMED,
    "Hi ",
    " \n",
    "<tool_",
    "<",
    "{",
    '"',
    "\\",
    "</tool_call>",
    "käse",
    "x<y",
]


def merged(events: list[CallEvent]) -> list[CallEvent]:
    """Neighbours that belong together, joined."""
    joined: list[CallEvent] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Text) and isinstance(last, Text):
            joined[-1] = Text(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments) and last.index == event.index:
            joined[-1] = CallArguments(event.index, last.text + event.text)
        else:
            joined.append(event)
    return joined


def read(pieces: list[str], trusted: bool) -> list[CallEvent]:
    parser = ToolCallParser(["f", "g"], trusted=trusted)
    return merged([event for piece in pieces for event in parser.push(piece)] + parser.flush())


@pytest.mark.parametrize("trusted", [True, False])
@given(data=st.data())
def test_cuts_change_nothing(trusted: bool, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(FRAGMENTS), max_size=6)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read([text], trusted)
    assert read(pieces, trusted) == whole
    assert read(list(text), trusted) == whole


@given(st.lists(st.sampled_from([*FRAGMENTS]), max_size=6), st.booleans())
def test_calls_are_numbered_and_their_arguments_parse(fragments: list[str], trusted: bool) -> None:
    events = read(fragments, trusted)
    starts = [event for event in events if isinstance(event, CallStart)]
    assert [start.index for start in starts] == list(range(len(starts)))
    if not trusted:
        arguments = [event for event in events if isinstance(event, CallArguments)]
        assert [event.index for event in arguments] == [start.index for start in starts]
        assert all(isinstance(json.loads(event.text), dict) for event in arguments)


@pytest.mark.parametrize("trusted", [True, False])
def test_text_and_parallel_calls(trusted: bool) -> None:
    events = read([f"Let me see.\n\n{CALL}\n{SHORT} Done. "], trusted)
    assert events[0] == Text("Let me see.")
    assert events[1] == CallStart(0, "f")
    assert isinstance(events[2], CallArguments)
    assert json.loads(events[2].text) == {"a": [1, {"b": '}</tool_call>"'}]}
    assert events[3:] == [CallStart(1, "g"), CallArguments(1, "{}"), Text("Done. ")]


def test_arguments_stream_when_a_grammar_keeps_them() -> None:
    parser = ToolCallParser(["f"], trusted=True)
    assert parser.push('<tool_call>\n{"name": "f", "arguments": ') == []
    assert parser.push('{"city": "Kö') == [CallStart(0, "f"), CallArguments(0, '{"city": "Kö')]
    assert parser.push('ln"') == [CallArguments(0, 'ln"')]
    assert parser.push("}}\n</tool") == [CallArguments(0, "}")]
    assert parser.flush() == []


def test_keys_in_another_order_are_a_call_too() -> None:
    assert read([SWAPPED], False) == read([SWAPPED], True) == [CallStart(0, "f"), CallArguments(0, '{"a": 1}')]


@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert read([f"a \n{text} b"], False) == [Text(f"a \n{text} b")]


@pytest.mark.parametrize("size", range(12, len(SHORT) - len("}</tool_call>")))
def test_a_cut_call_that_is_not_trusted_is_text(size: int) -> None:
    assert read([SHORT[:size]], False) == [Text(SHORT[:size])]
