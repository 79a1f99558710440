"""Questions about a scene and their one right answer each; other wordings are kept for the exam."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass

from training.starter_vl.scenes import COLOURS, COUNTS, DIGITS, PLACES, SHAPES, Scene

KINDS = ("colour", "shape", "count", "position", "digit")
# {} is a thing's shape or colour; the first list is for training, the second for the exam alone
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "colour": (
        (
            "What colour is the {}?",
            "What color is the {}?",
            "Which colour does the {} have?",
            "Tell me the color of the {}.",
            "The {} is of what colour?",
            "Name the colour of the {}.",
        ),
        ("Which color is the {}?", "What is the colour of the {}?"),
    ),
    "shape": (
        (
            "What shape is {}?",
            "Which shape is {}?",
            "What {} shape do you see?",
            "Name the {} shape.",
            "The {} thing is what shape?",
            "What is the shape of the {} thing?",
        ),
        ("Which shape is the {} one?", "What {} shape is in the picture?"),
    ),
    "count": (
        (
            "How many shapes are there?",
            "How many shapes do you see?",
            "Count the shapes.",
            "How many things are in the picture?",
            "What is the number of shapes?",
            "How many objects are shown?",
        ),
        ("How many shapes are in this picture?", "How many things can you see?"),
    ),
    "position": (
        (
            "Where is the {}?",
            "Where do you see the {}?",
            "In which part of the picture is the {}?",
            "What is the position of the {}?",
            "Where in the picture is the {}?",
            "Tell me where the {} is.",
        ),
        ("Where can you see the {}?", "In what part of the image is the {}?"),
    ),
    "digit": (
        (
            "Which digit is it?",
            "What digit do you see?",
            "Read the digit.",
            "Which number is written here?",
            "What number is shown?",
            "Which digit is in the picture?",
        ),
        ("What digit is this?", "Which number do you see?"),
    ),
}


# sentences as the language model forms them by itself: a picture then only has to fill in the word
ANSWERS = {
    "colour": "The {asked} is {fact}.",
    "shape": "The {asked} shape is a {fact}.",
    "count": "There are {fact} shapes.",
    "position": "The {asked} is at the {fact}.",
    "digit": "The digit is {fact}.",
}
# what may stand for the fact in an answer, the longer before what it begins with
FACTS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "count": COUNTS,
    "position": tuple(sorted(PLACES, key=len, reverse=True)),
    "digit": tuple(DIGITS),
}


@dataclass(frozen=True)
class Asked:
    """A question, the fact that it asks for, and the sentence that the model learns to answer with."""

    kind: str
    question: str
    fact: str
    answer: str

    def is_right(self, answer: str) -> bool:
        """Whether an answer names this fact, and no other of its kind."""
        found = re.findall(rf"\b({'|'.join(FACTS[self.kind])})\b", answer.lower())
        return set(found) == {self.fact}


def ask(shown: Scene, chance: random.Random, *, exam: bool = False) -> list[Asked]:
    """One question of each kind that the scene has one right answer to, in an order by chance."""
    found = [_asked(kind, slot, answer, chance, exam) for kind, slot, answer in _facts(shown, chance)]
    chance.shuffle(found)
    return found


def ask_more(shown: Scene, chance: random.Random, most: int) -> list[Asked]:
    """Up to ``most`` different questions, several of a kind where there are several things."""
    found = {one.answer: one for _ in range(4) for one in ask(shown, chance)}
    return list(found.values())[:most]


def _asked(kind: str, slot: str, answer: str, chance: random.Random, exam: bool) -> Asked:
    sentence = "There is one shape." if answer == "one" else ANSWERS[kind].format(asked=slot, fact=answer)
    return Asked(kind, chance.choice(WORDINGS[kind][exam]).format(slot), answer, sentence)


def _facts(shown: Scene, chance: random.Random) -> list[tuple[str, str, str]]:
    if shown.digit:
        return [("digit", "", shown.digit), ("colour", "digit", shown.colour)]
    shapes = Counter(thing.shape for thing in shown.things)
    colours = Counter(thing.colour for thing in shown.things)
    found = [("count", "", COUNTS[len(shown.things) - 1])]
    if by_shape := [thing for thing in shown.things if shapes[thing.shape] == 1]:
        thing = chance.choice(by_shape)
        found.append(("colour", thing.shape, thing.colour))
        thing = chance.choice(by_shape)
        found.append(("position", thing.shape, PLACES[thing.place]))
    if by_colour := [thing for thing in shown.things if colours[thing.colour] == 1]:
        thing = chance.choice(by_colour)
        found.append(("shape", thing.colour, thing.shape))
    return found
