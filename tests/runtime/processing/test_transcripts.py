"""How transcripts are read: as transformers' processor reads them, piece by piece."""

from __future__ import annotations

import re

import pytest

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.processing.transcripts import LANGUAGES, Transcript, language_of, prefill

ANSWERS = [
    "language English<asr_text>What was said.",
    "language Chinese<asr_text> 你好。 ",
    "language None<asr_text>",
    "LANGUAGE none<asr_text>hm",
    "\n language German \n<asr_text>Guten\nTag",
    "English<asr_text>Hello",
    "<asr_text>Hello",
    "No mark at all",
    "Words that go on for longer than any name of a language could, and no mark among them.",
    "language English<asr_text>one<asr_text>two",
    "",
    "  ",
]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_language_and_text_are_those_of_transformers(answer: str, size: int) -> None:
    from transformers.models.qwen3_asr.processing_qwen3_asr import _parse_single_output

    wanted = _parse_single_output(answer)
    found = Transcript(None)
    pieces = [found.push(answer[begin : begin + size]) for begin in range(0, len(answer), size)]
    pieces.append(found.flush())
    assert (found.text, found.language) == (wanted["transcription"], wanted["language"])
    assert "".join(pieces).strip() == found.text


def test_an_answer_that_was_begun_is_text_from_its_first_character() -> None:
    found = Transcript("English")
    assert [found.push(piece) for piece in (" He", "llo ")] == ["He", "llo "]
    assert (found.text, found.language) == ("Hello", "English")


def test_languages_are_those_of_transformers() -> None:
    from transformers.models.qwen3_asr.processing_qwen3_asr import LANGUAGE_CODE_TO_NAME

    assert LANGUAGES == LANGUAGE_CODE_TO_NAME
    assert language_of(" EN ", where="language") == language_of("english", where="language") == "English"
    assert prefill("English") == "language English<asr_text>"
    with pytest.raises(RequestError, match=re.escape("'Klingon' is not one of ar (Arabic)")) as fault:
        language_of("Klingon", where="language")
    assert fault.value.where == "language"
