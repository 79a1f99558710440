"""Marks at the end of a stream, against the plain definition, and how much work they are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.processing.tails import begun
from qwen_onnx.runtime.service.answers import StopStrings
from qwen_onnx.runtime.service.generation import MOST_STOP_CHARACTERS, GenerationConfig

few = st.text(alphabet="ab", max_size=12)
marks = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


@given(few, marks)
def test_begun_is_the_longest_tail_that_begins_a_mark(text: str, given_marks: list[str]) -> None:
    sizes = [size for mark in given_marks for size in range(len(mark)) if text.endswith(mark[:size])]
    assert begun(text, given_marks) == max(sizes, default=0)


@given(st.lists(few, max_size=6), marks)
def test_stop_strings_cut_pieces_as_a_search_in_all_held_text_does(pieces: list[str], stops: list[str]) -> None:
    stopper, held = StopStrings(stops), ""
    for piece in pieces:
        held += piece
        found = [index for stop in stops if (index := held.find(stop)) >= 0]
        if found:
            assert stopper.push(piece) == held[: min(found)]
            assert stopper.hit
            return
        sizes = [size for mark in stops for size in range(len(mark)) if held.endswith(mark[:size])]
        safe = len(held) - max(sizes, default=0)
        assert stopper.push(piece) == held[:safe]
        held = held[safe:]
    assert stopper.flush() == held


class Counted(str):
    """A text that counts the characters that are taken out of it."""

    taken = 0

    def __getitem__(self, key):  # type: ignore[no-untyped-def]
        part = super().__getitem__(key)
        Counted.taken += len(part)
        return part


def test_the_work_is_linear_in_the_text_however_long_the_mark() -> None:
    size, text = 20_000, "a" * 2000
    mark = Counted("a" * size + "b")
    stopper = StopStrings([mark])
    Counted.taken = 0
    for character in text:
        assert stopper.push(character) == ""
    assert Counted.taken <= 4 * len(text)
    Counted.taken = 0
    assert begun(text, [mark]) == len(text)
    # the table of the mark is made anew, once
    assert Counted.taken <= 4 * (size + len(text))


def test_a_long_stop_string_is_refused() -> None:
    GenerationConfig(stop=("a" * MOST_STOP_CHARACTERS,))
    with pytest.raises(RequestError, match="257 characters, the most is 256") as caught:
        GenerationConfig(stop=("a", "a" * (MOST_STOP_CHARACTERS + 1)))
    assert caught.value.where == "stop"
