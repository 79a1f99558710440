"""Spoken digits: what is said follows from a seed, the exam hears others than the training, and how it counts."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from training.starter_audio.exam import digits_of, in_place
from training.starter_audio.features import Clean, disturbed
from training.starter_audio.language import QUESTIONS, answer_to, asked
from training.starter_audio.sounds import ACCENTS, MOST_DIGITS, PITCHES, SETTINGS, SPEEDS, VARIANTS, Split, said
from training.starter_audio.tower import NOTHING, heard, peaks, tokens_of
from training.starter_audio.train import batch_of

SEEDS = range(300)


def test_the_exam_has_other_voices_and_speeds() -> None:
    assert not set(VARIANTS["training"]) & set(VARIANTS["exam"])
    assert set(ACCENTS["exam"]) - set(ACCENTS["training"])
    assert not set(range(*SPEEDS["training"], 2)) & set(range(*SPEEDS["exam"], 2))
    assert PITCHES["exam"][0] < PITCHES["training"][0] < PITCHES["training"][1] < PITCHES["exam"][1]
    assert not set(QUESTIONS["training"]) & set(QUESTIONS["exam"])


@pytest.mark.parametrize("split", ["training", "exam", "flite"])
def test_what_is_said_follows_from_its_seed(split: Split) -> None:
    found = [said(seed, split) for seed in SEEDS]
    assert found == [said(seed, split) for seed in SEEDS]
    assert set(Counter(len(one.digits) for one in found)) == set(range(1, MOST_DIGITS + 1))
    assert {digit for one in found for digit in one.digits} == set(range(10))
    assert len({one.voice for one in found}) > (3 if split == "flite" else 40)


def test_answers_name_what_was_said() -> None:
    for seed in SEEDS:
        row = asked(random.Random(seed), "training")
        assert heard(row.tokens) == tuple(row.digits) == digits_of(answer_to(row.digits))


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("four, five.", (4, 5)),
        ("The digits are 4 and five.", (4, 5)),
        ("45", (4, 5)),
        ("Someone is often alone.", ()),
        ("Zero, zero", (0, 0)),
    ],
)
def test_an_answer_names_digits_by_words_and_figures(answer: str, named: tuple[int, ...]) -> None:
    assert digits_of(answer) == named


def test_a_digit_counts_in_its_order() -> None:
    assert in_place((1, 2, 3), (1, 2, 3)) == [True] * 3
    assert in_place((1, 2, 3), (1, 3)) == [True, False, True]
    assert in_place((1, 2, 3), ()) == [False] * 3


def test_a_digit_that_lasts_is_told_once() -> None:
    says = torch.zeros(7, 11)
    for token, (digit, certain) in enumerate([(0, 1), (4, 0.6), (4, 0.9), (0, 1), (4, 0.8), (7, 0.9), (7, 0.5)]):
        says[token, digit] = certain
    assert heard(says.argmax(-1).tolist()) == (3, 3, 6)
    assert peaks(says).tolist() == [NOTHING, NOTHING, 4, NOTHING, 4, 7, NOTHING]


def test_disturbed_sounds_keep_their_digits_and_end_in_silence() -> None:
    chance = torch.Generator().manual_seed(0)
    kept = [
        Clean((size % 10,), torch.rand(SETTINGS.feature_size, 20 + size, generator=chance) * 4 - 6)
        for size in range(64)
    ]
    chosen = batch_of(kept, 3, 8)
    made = disturbed(chosen, 3)
    assert made.digits == [one.digits for one in chosen]
    assert torch.equal(made.mel, disturbed(chosen, 3).mel)
    assert not torch.equal(made.mel, disturbed(chosen, 4).mel)
    for row, size, one in zip(made.mel, made.frames.tolist(), chosen, strict=True):
        assert size >= one.log_power.shape[1]
        assert float(row[:, size:].max()) == float(row.min())
        assert float(row.max() - row.min()) <= 2.0 + 1e-5
    assert tokens_of(torch.tensor([0, 3, 4, 100])).tolist() == [0, 1, 1, 25]
