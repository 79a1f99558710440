"""What a picture's tokens should say to the language model, as a sum of one vector for each thing that is true.

The vectors begin as embeddings of words and are tuned through the frozen model, which then answers from the sum; no
picture is needed for it. The tower learns them afterwards as its output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.starter_vl.language import TOKENS, WIDTH, Language
from training.starter_vl.scenes import COLOURS, COUNTS, DIGITS, PLACES, SHAPES, Scene

# by part: what a token may say; "" comes first where a token may say nothing
PARTS: dict[str, tuple[str, ...]] = {
    "colour": ("", *COLOURS),
    "shape": ("", *SHAPES),
    "place": ("", *PLACES),
    "count": ("", *COUNTS),
    "digit": ("", *DIGITS),
}


PLACE_OF = {(part, text): place for place, (part, text) in enumerate((p, t) for p in PARTS for t in PARTS[p])}
SAID = len(PLACE_OF)


def truth(shown: Scene) -> dict[str, list[str]]:
    """By part, what each token of a picture should say. Count, digit and a digit's colour are said by all."""
    found = {part: [""] * TOKENS for part in PARTS}
    if shown.digit:
        return found | {"digit": [shown.digit] * TOKENS, "colour": [shown.colour] * TOKENS}
    found["count"] = [COUNTS[len(shown.things) - 1]] * TOKENS
    for thing in shown.things:
        for part, text in (("colour", thing.colour), ("shape", thing.shape), ("place", PLACES[thing.place])):
            found[part][thing.place] = text
    return found


def said(scenes: Sequence[Scene]) -> Tensor:
    """``truth`` of several as ones among zeros, [scenes, TOKENS, SAID]."""
    answer = torch.zeros(len(scenes), TOKENS, SAID)
    for index, shown in enumerate(scenes):
        for part, texts in truth(shown).items():
            for token, text in enumerate(texts):
                answer[index, token, PLACE_OF[part, text]] = 1.0
    return answer


def first_words(language: Language) -> Tensor:
    """[SAID, hidden]: the embeddings of the words, and zeros for what says nothing."""
    return torch.stack([language.words(text) if text else torch.zeros(WIDTH) for _, text in PLACE_OF])
