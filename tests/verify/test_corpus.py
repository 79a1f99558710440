"""What an artifact is judged on: eight domains, more than ten languages, and nothing that the quantiser has seen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib import util
from typing import get_args

import pytest

from qwen_onnx.errors import VerificationError
from qwen_onnx.export import calibration
from qwen_onnx.verify import corpus
from qwen_onnx.verify.records import DEPTHS, Depth, VerifyOptions

DOMAINS = ["code", "reference", "docstrings", "dialogue", "mathematics", "facts", "prose", "multilingual"]
SHINGLE = 12  # words; sentences of fewer than 60 characters repeat by chance, as a line of a licence does


def chunks(text: str) -> Iterator[bytes]:
    """Hashes of every twelve words of a text, and of its sentences, case and white space apart."""
    words = text.casefold().split()
    shingles = (" ".join(words[begin : begin + SHINGLE]) for begin in range(len(words) - SHINGLE + 1))
    sentences = (" ".join(part.casefold().split()) for part in corpus.SENTENCE_END.split(text))
    for chunk in (*shingles, *(sentence for sentence in sentences if len(sentence) > 60)):
        yield hashlib.blake2b(chunk.encode(), digest_size=8).digest()


@pytest.mark.slow
def test_every_domain_has_texts_with_and_without_a_template() -> None:
    rendered = corpus.domains(lambda turns: f"<{len(turns)}>" + corpus.transcript(turns))
    plain = corpus.domains(None)
    assert list(rendered) == list(plain) == DOMAINS
    for documents in (*rendered.values(), *plain.values()):
        assert sum(len(document.text) for document in documents) > 4000
        assert len({document.source for document in documents}) == len(documents)
    assert plain["dialogue"][0].text.startswith("User: My sourdough")
    assert rendered["dialogue"][0].text.startswith("<6>User: My sourdough")


@pytest.mark.slow
def test_no_text_was_calibrated_on() -> None:
    seen = [calibration.code(), *calibration.topics().values(), calibration.multilingual()]
    seen += [turn["content"] for turns in calibration.conversations() for turn in turns]
    learnt = {chunk for text in seen for chunk in chunks(text)}
    assert len(learnt) > 100_000
    leaks = {
        document.source: sum(chunk in learnt for chunk in chunks(document.text))
        for documents in corpus.domains(None).values()
        for document in documents
    }
    assert {source: count for source, count in leaks.items() if count} == {}
    packages = {name.partition(".")[0] for name in corpus.EVALUATION_SOURCES}
    assert not packages & set(calibration.CALIBRATION_PACKAGES)


def test_a_leak_would_be_found() -> None:
    sentence = "Avant de réparer la pompe, il faut couper l'arrivée d'eau et vider le réservoir."
    assert set(chunks(sentence)) & set(chunks(f"Otherwise.\n{sentence.upper()}  And more."))
    assert not set(chunks(sentence)) & set(chunks(sentence.replace("pompe", "porte")))


def test_the_first_windows_hold_more_than_ten_languages() -> None:
    paragraphs = corpus.languages()
    assert all(len(sentences) >= 2 for sentences in paragraphs)
    # languages come in one order; the second time round two more
    language = {
        sentence: place % 14 if place < 28 else place for place, row in enumerate(paragraphs) for sentence in row
    }
    assert len(set(language.values())) == 16
    first = [document.text[:650].splitlines()[:-1] for document in corpus.domains(None)["multilingual"][:2]]
    assert len({language[sentence] for lines in first for sentence in lines}) > 10


def test_a_conversation_takes_turns() -> None:
    found = corpus.conversations()
    assert len(found) >= 10
    for turns in found:
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2) + ["user"] * (
            len(turns) % 2
        )


def test_windows_come_from_every_document_in_turn() -> None:
    documents = [corpus.Document(name, name * size) for name, size in (("a", 40), ("b", 20), ("c", 7))]
    found = corpus.windows("code", documents, lambda text: [ord(letter) for letter in text], 10)
    assert [window.source for window in found] == ["a", "b", "a", "b", "a", "a"], "the third is shorter than a window"


def test_without_mpmath_the_message_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(VerificationError, match="mpmath is missing"):
        corpus.functions()


@pytest.mark.parametrize("depth", get_args(Depth))
def test_a_depth_says_how_much_is_read(depth: Depth) -> None:
    options = VerifyOptions.of(depth)
    assert (options.depth, options.window, options.windows_per_domain) == (depth, *DEPTHS[depth])
    assert VerifyOptions() == VerifyOptions.of("quick")
    assert DEPTHS["release"] > DEPTHS["quick"]
