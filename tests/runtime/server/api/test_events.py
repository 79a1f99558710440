"""Deltas to events: reasoning, text and calls apart, wherever the pieces are cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qwen_onnx.runtime.server.api.events import Answer, Call, Reader, Reading, Step
from qwen_onnx.runtime.service.generation import Delta, FinishReason, TokenLogprob

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "</think>"}}\n</tool_call>'
PLAIN, TOOLS = Reading(thinks=True), Reading(thinks=True, functions=["f"], trusted=True)


def read(pieces: list[str], reading: Reading, reason: FinishReason = "stop") -> tuple[Answer, list[Step]]:
    reader, answer, told = Reader(reading), Answer(), []
    deltas = [
        Delta(piece, 1, count, None, logprobs=(TokenLogprob(piece, piece.encode(), -float(count)),))
        for count, piece in enumerate(pieces, 1)
    ]
    for delta in [*deltas, Delta("", 1, len(pieces), reason)]:
        for step in reader.feed(delta):
            answer.add(step)
            told.append(step)
    return answer, told


@given(st.data())
def test_cuts_change_nothing(data: st.DataObject) -> None:
    fragments = ["<think>", "</think>", "hm\n", CALL, "a", "\n", "<", "</", "<tool_call>", "ü"]
    text = "".join(data.draw(st.lists(st.sampled_from(fragments), max_size=6)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    reading = data.draw(st.sampled_from([PLAIN, TOOLS, Reading(), Reading(thinks=True, inside=True)]))
    cut, steps = read(pieces, reading)
    whole, _ = read([text], reading)
    assert (cut.reasoning, cut.content, cut.calls) == (whole.reasoning, whole.content, whole.calls)
    assert cut.end is not None
    assert whole.end is not None
    assert cut.end.reason == whole.end.reason
    assert steps[-1].event is cut.end
    assert [entry.token for entry in cut.logprobs] == pieces, "no log probability is lost or told twice"


def test_reasoning_text_and_calls() -> None:
    answer, _ = read(["<think>\n", "hm", "\n</think>", "\n\nHi\n", CALL], TOOLS)
    assert (answer.reasoning, answer.content) == ("hm", "Hi")
    assert answer.calls == [Call("f", '{"a": "</think>"}')]
    assert answer.end is not None
    assert answer.end.reason == "tool_calls"
    assert answer.end.reasoning_tokens == 2


def test_a_cut_call_keeps_the_reason_length() -> None:
    answer, _ = read([CALL[: CALL.index('": ', 40)]], TOOLS, "length")
    assert answer.end is not None
    assert answer.end.reason == "length"
    assert answer.calls == [Call("f", '{"a')]


def test_reasoning_that_the_prompt_has_opened() -> None:
    answer, _ = read(["hm</th", "ink>\n\n", "Hi"], Reading(thinks=True, inside=True))
    assert (answer.reasoning, answer.content) == ("hm", "Hi")


def test_calls_and_tags_are_text_where_they_are_not_known() -> None:
    answer, _ = read(["<think>x</think>", CALL], Reading())
    assert (answer.reasoning, answer.content, answer.calls) == ("", f"<think>x</think>{CALL}", [])
