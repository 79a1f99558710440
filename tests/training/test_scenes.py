"""Synthetic pictures and their questions: made by a seed alone, and true."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from training.starter_vl.exam import items
from training.starter_vl.pixels import SETTINGS, one_frame
from training.starter_vl.questions import KINDS, WORDINGS, Asked, ask
from training.starter_vl.scenes import COLOURS, COUNTS, GRID, PLACES, draw, scene, side_of
from training.starter_vl.tower import SIDE
from training.starter_vl.words import PARTS, SAID, said, truth

SEEDS = range(5_000, 5_120)
PILLOWS = [""]


def test_a_seed_makes_the_same_picture_again_and_another_size_shows_the_same() -> None:
    one, other = (draw(scene(SEEDS[0]), 96, PILLOWS).tobytes() for _ in range(2))
    assert one == other
    assert draw(scene(SEEDS[1]), 96, PILLOWS).tobytes() != one
    small, large = (np.asarray(draw(scene(SEEDS[0]), side, PILLOWS).resize((48, 48)), int) for side in (96, 384))
    assert np.abs(small - large).mean() < 4


def test_a_thing_is_where_the_scene_says_and_has_its_colour() -> None:
    for seed in SEEDS:
        shown, side = scene(seed), 150
        picture = draw(shown, side, PILLOWS)
        for thing in shown.things:
            row, column = int(thing.y * GRID), int(thing.x * GRID)
            assert PLACES[thing.place] == PLACES[row * GRID + column]
            pixel = picture.getpixel((int(thing.x * side), int(thing.y * side)))
            assert isinstance(pixel, tuple)
            near = min(COLOURS, key=lambda name: sum(abs(a - b) for a, b in zip(COLOURS[name], pixel, strict=True)))
            assert near == thing.colour


def test_things_do_not_touch_one_another() -> None:
    for shown in map(scene, SEEDS):
        for first in shown.things:
            for second in shown.things:
                if first is not second:
                    apart = max(abs(first.x - second.x), abs(first.y - second.y))
                    assert apart > (first.radius + second.radius) * 0.9


def test_a_digit_differs_from_every_other() -> None:
    base = next(shown for shown in map(scene, SEEDS) if shown.digit)
    pictures = {
        draw(base.__class__((), digit, base.colour, base.noise), 96, PILLOWS).tobytes() for digit in "0123456789"
    }
    assert len(pictures) == 10


def test_every_question_has_one_right_answer() -> None:
    kinds: Counter[str] = Counter()
    for seed in SEEDS:
        shown = scene(seed)
        for asked in ask(shown, random.Random(seed)):
            kinds[asked.kind] += 1
            assert asked.is_right(asked.answer)
            if asked.kind == "count":
                assert asked.fact == COUNTS[len(shown.things) - 1]
            if asked.kind == "digit":
                assert asked.fact == shown.digit
            named = [thing for thing in shown.things if thing.shape in asked.question or thing.colour in asked.question]
            if asked.kind in ("colour", "shape", "position") and not shown.digit:
                assert len(named) == 1
                facts = {named[0].colour, named[0].shape, PLACES[named[0].place]}
                assert asked.fact in facts
    assert set(kinds) == set(KINDS)


def test_the_exam_words_its_questions_otherwise() -> None:
    for training, exam in WORDINGS.values():
        assert len(training) >= 5
        assert not set(training) & set(exam)


@pytest.mark.parametrize("side", [72, 83, 84, 85, 97, 200, 333, 512])
def test_a_square_of_any_size_becomes_the_same_grid(side: int) -> None:
    patches = one_frame(draw(scene(SEEDS[2]), side, PILLOWS))
    assert patches.shape == ((SIDE // SETTINGS.patch_size) ** 2, 3 * SETTINGS.patch_size**2)


def test_what_tokens_say_is_one_thing_of_every_part() -> None:
    scenes = [scene(seed) for seed in SEEDS]
    told = said(scenes)
    assert told.shape == (len(scenes), GRID**2, SAID)
    assert bool((told.sum(-1) == len(PARTS)).all())
    for shown in scenes:
        found = truth(shown)
        assert sum(1 for text in found["shape"] if text) == len(shown.things)
        assert bool(shown.digit) == all(found["digit"])


def test_the_exam_asks_all_kinds_and_draws_sizes() -> None:
    asked = list(items(60, PILLOWS))
    kinds = Counter(item.asked.kind for item in asked)
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) >= 6
    assert len({side_of(item.seed) for item in asked}) > 20
    assert [item.png for item in items(3, PILLOWS)] == [item.png for item in asked[:3]]


@pytest.mark.parametrize(
    ("kind", "fact", "answer", "right"),
    [
        ("position", "top left", "The star is at the top left.", True),
        ("position", "top left", "Top left", True),
        ("position", "top left", "The star is at the top.", False),
        ("position", "top", "The star is at the top left.", False),
        ("colour", "red", "It is red and blue.", False),
        ("colour", "red", "It is bored.", False),
        ("shape", "circle", "The red shape is a circle.", True),
        ("digit", "7", "The digit is 17.", False),
        ("digit", "7", "The digit is 7.", True),
        ("count", "one", "", False),
    ],
)
def test_an_answer_is_right_when_it_names_the_fact_and_no_other(kind: str, fact: str, answer: str, right: bool) -> None:
    assert Asked(kind, "?", fact, "").is_right(answer) is right
