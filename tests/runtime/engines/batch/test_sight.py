"""How often the encoder runs: once for a picture, as long as something remembers it."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.runtime.engines.batch import BatchEngine
from qwen_onnx.runtime.engines.batch.sight import Floats, Sight
from qwen_onnx.runtime.engines.batch.steps import PREFILL_CHUNK
from qwen_onnx.runtime.engines.interface import TokenEvent, TokenRequest
from qwen_onnx.runtime.engines.media import Picture
from qwen_onnx.runtime.engines.sampling import GREEDY, Sampling
from qwen_onnx.runtime.processing.images import prepare
from tests.fixtures.pictures import SETTINGS, chart, noise

ONE, OTHER, THIRD = (
    prepare(image, SETTINGS, where="it") for image in (chart(112, 84), noise(112, 84), noise(112, 84, seed=1))
)
SEEDED = Sampling(seed=1)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Digests of what the encoder was given, in order; it still does its work."""
    found: list[str] = []
    encode = Sight.encode

    def counted(self: Sight, picture: Picture) -> Floats:
        found.append(picture.digest)
        return encode(self, picture)

    monkeypatch.setattr(Sight, "encode", counted)
    return found


@pytest.fixture
def engine(seeing_artifact: Path) -> Iterator[BatchEngine]:
    """Two rows."""
    running = BatchEngine(seeing_artifact, streams=2, capacity=512, threads=1)
    yield running
    running.close()


def begun(
    engine: BatchEngine, image: int, *parts: int | Picture, sampling: Sampling = GREEDY, scope: str = ""
) -> queue.SimpleQueue[TokenEvent]:
    """A prompt of tokens and pictures, under way."""
    pictures = tuple(part for part in parts if isinstance(part, Picture))
    ids = [token for part in parts for token in ([part] if isinstance(part, int) else [image] * part.tokens)]
    events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
    engine.submit(TokenRequest(tuple(ids), 3, sampling, cache_scope=scope, media=pictures), events.put)
    return events


def answer(events: queue.SimpleQueue[TokenEvent]) -> tuple[list[int], int]:
    """Its tokens, and how many of the prompt's were cached."""
    tokens: list[int] = []
    while True:
        event = events.get(timeout=60)
        assert event.error is None
        if event.token is not None:
            tokens.append(event.token)
        if event.last:
            return tokens, event.cached_tokens


@pytest.fixture(scope="module")
def image(seeing_artifact: Path) -> int:
    """The token of a picture."""
    token = GenaiConfig.read(seeing_artifact).model.image_token_id
    assert token is not None
    return token


def filler(first: int, count: int = 40) -> Sequence[int]:
    return [10 + (first * 7 + index) % 200 for index in range(count)]


def test_a_follow_up_does_not_encode_again(engine: BatchEngine, image: int, encoded: list[str]) -> None:
    said, _ = answer(begun(engine, image, 5, ONE, 6, 7))
    _, cached = answer(begun(engine, image, 5, ONE, 6, 7, *said, 8, 9))
    assert cached >= 1 + ONE.tokens + 2
    assert encoded == [ONE.digest]
    answer(begun(engine, image, 5, OTHER, 6, 7))
    assert encoded == [ONE.digest, OTHER.digest]


def test_nor_does_it_behind_another_beginning_or_when_its_row_is_lost(
    engine: BatchEngine, image: int, encoded: list[str]
) -> None:
    wanted = answer(begun(engine, image, 5, ONE, 6))[0]
    _, cached = answer(begun(engine, image, 90, 91, ONE, 6))
    assert cached == 0
    for first in (1, 2):
        answer(begun(engine, image, *filler(first)))
    tokens, cached = answer(begun(engine, image, 5, ONE, 6))
    assert cached == 0
    assert tokens == wanted
    assert encoded == [ONE.digest]


def test_several_answers_to_one_question_encode_once(engine: BatchEngine, image: int, encoded: list[str]) -> None:
    """They are read in turns, so that the second finds half the picture in the row of the first."""
    together = [begun(engine, image, *filler(3, PREFILL_CHUNK - ONE.tokens // 2), ONE, *filler(4)) for _ in range(2)]
    one, other = (answer(events)[0] for events in together)
    assert one == other
    assert encoded == [ONE.digest]


def test_a_seed_gives_the_same_with_a_picture_that_was_kept(
    engine: BatchEngine, image: int, encoded: list[str]
) -> None:
    first, again = (answer(begun(engine, image, 5, ONE, 6, sampling=SEEDED)) for _ in range(2))
    assert first == again
    assert first[1] == 0
    assert encoded == [ONE.digest]


def test_another_scope_finds_nothing(engine: BatchEngine, image: int, encoded: list[str]) -> None:
    for scope in ("one", "other", "one"):
        answer(begun(engine, image, 5, ONE, 6, sampling=SEEDED, scope=scope))
    assert encoded == [ONE.digest] * 2


def test_what_is_kept_is_bounded(seeing_artifact: Path, encoded: list[str]) -> None:
    """Room for one picture and a half."""
    size = Sight(seeing_artifact, 1).encode(ONE).nbytes
    encoded.clear()
    sight = Sight(seeing_artifact, 1, kept_bytes=size * 3 // 2)
    for picture in (ONE, ONE, OTHER, OTHER, ONE):
        assert np.array_equal(sight.known(picture, ""), sight.known(picture, ""))
    assert encoded == [ONE.digest, OTHER.digest, ONE.digest]
    encoded.clear()
    none = Sight(seeing_artifact, 1, kept_bytes=size - 1)
    none.known(ONE, "")
    none.known(ONE, "")
    assert encoded == [ONE.digest] * 2


def test_frames_of_a_video_are_encoded_once_at_whatever_speed(
    engine: BatchEngine, image: int, encoded: list[str]
) -> None:
    """A longer video finds the pairs that it begins with, and the same frames another time."""
    longer = (ONE, replace(OTHER, joined=True, moment=2), replace(THIRD, joined=True, moment=4))
    begin, _ = answer(begun(engine, image, 5, *longer[:2], 6))
    answer(begun(engine, image, 5, *longer, 6))
    slower, cached = answer(begun(engine, image, 5, ONE, replace(OTHER, joined=True, moment=9), 6))
    assert encoded == [ONE.digest, OTHER.digest, THIRD.digest]
    assert cached == 1 + ONE.tokens
    assert slower != begin


def test_an_answer_never_has_the_token_of_a_picture(engine: BatchEngine, image: int) -> None:
    """No picture stands behind it, and without one the embedding fails, and the engine with it."""
    wanted = Sampling(logit_bias={image: 100.0})
    for sampling in (wanted, Sampling(logit_bias={image: 100.0}, temperature=1.0, seed=3)):
        tokens, _ = answer(begun(engine, image, 5, ONE, 6, sampling=sampling))
        assert len(tokens) == 3
        assert image not in tokens
    assert not engine.stats().failed
