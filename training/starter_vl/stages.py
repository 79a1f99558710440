"""How long and how fast each part of starter-vl learns."""

from __future__ import annotations

from dataclasses import dataclass

from training.loop import Schedule
from training.starter_vl.scenes import Scene, scene

SEEDS = {"words": 100_000_000, "bound": 150_000_000, "tower": 200_000_000, "try": 300_000_000}
# digits take many more pictures to learn than shapes do
DIGITS_DRAWN = 0.6


@dataclass(frozen=True)
class Stage(Schedule):
    """How long and how fast a stage learns, and of which scenes.

    Attributes:
        noise: deviation of what the tower will say from the truth.
        digits, alone: see ``scene``.
        questions: the most about a picture; 0: one of each kind.
    """

    noise: float = 0.0
    digits: float = 0.25
    alone: float = 0.25
    questions: int = 0

    def scenes(self, step: int) -> tuple[list[int], list[Scene]]:
        """Seeds and scenes of a step."""
        first = SEEDS[self.name] + step * self.batch
        seeds = list(range(first, first + self.batch))
        return seeds, [scene(seed, self.digits, self.alone) for seed in seeds]


# together what two quiet cores do in half an hour
WORDS = Stage("words", steps=160, batch=6, rate=2e-3, warm=5, noise=0.1)
# what all tokens say is learned by then; now which of them is asked about
BOUND = Stage(
    "bound", steps=200, batch=8, rate=1e-3, warm=5, noise=0.05, digits=0.15, alone=0.1, questions=5, faster=4.0
)
TOWER = Stage("tower", steps=1500, batch=64, rate=2e-3, warm=50, digits=DIGITS_DRAWN)
