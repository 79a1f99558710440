"""When guessed tokens are worth a wider step: one step of the model computes what follows each of several tokens.

A step for ``k`` guessed tokens behind the one that is due costs more than a plain one, and gives one token and as many
of the guessed as are right. Each token is drawn from its own logits by the answer's own sampler, one after the other,
until one differs from the guess: what is drawn is what plain steps would have drawn. A wrong guess costs time alone,
and how much an answer may lose is bounded here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from qwen_onnx.runtime.engines.batch.draft_head import Ahead
from qwen_onnx.runtime.engines.batch.drafts import Drafts
from qwen_onnx.runtime.engines.batch.layout import Floats

# tokens of a step; few, so that what each costs is soon known
WIDTHS = (2, 3, 4, 6, 8, 12, 16)
# plain steps that each more token of a step costs, until it was timed: docs/lab-log.md
SLOPE = 0.3
# of what a step was found to cost
WEIGHT = 0.1
# a step must give so many times what plain ones would give in its time
LEAST_GAIN = 1.05
# plain steps that an answer may lose in the beginning, gains for each token, and has in hand at most
ALLOWANCE, ACCRUAL, MOST = 1.0, 0.02, 5.0
# tokens that a head for multi-token prediction guesses at most; how often the first, second and third are taken to be
# right before any was, and what each then weighs; plain steps that a guess costs, until it was timed
DRAFTED, TRUST, TRUST_WEIGHT, DRAFT = 3, (0.7, 0.6, 0.5), 0.05, 0.3
# plain steps in hand with which it is asked though it was not worth it
TRIAL = 1.0


class Costs:
    """What steps cost, in plain ones. One that is told no times keeps to the model: its answers are the same always."""

    def __init__(self) -> None:
        self._plain: float | None = None
        self._found: dict[int, float] = {}
        # of a guess by a head, in plain steps, and how often each of a few is right
        self.draft, self.trust = DRAFT, list(TRUST)

    def of(self, width: int) -> float:
        """Plain steps that one of ``width`` tokens takes."""
        if width in self._found or not self._found:
            return self._found.get(width, 1 + SLOPE * (width - 1))
        nearest = min(self._found, key=lambda other: abs(other - width))
        return 1 + (self._found[nearest] - 1) * (width - 1) / (nearest - 1)

    def note(self, width: int, seconds: float) -> None:
        """A step of ``width`` tokens took so long. Single outliers move little: the machine did something else."""
        if width == 1:
            before = self._plain or seconds
            self._plain = before + WEIGHT * (min(seconds, 2 * before) - before)
        elif self._plain:
            before = self.of(width)
            self._found[width] = max(1.0, before + WEIGHT * (min(seconds / self._plain, 2 * before) - before))

    def note_draft(self, guesses: int, seconds: float) -> float:
        """So many guesses by a head took so long; how many plain steps that is."""
        if not self._plain:
            return self.draft * guesses
        took = seconds / self._plain
        self.draft += WEIGHT * (min(took / guesses, 2 * self.draft) - self.draft)
        return took

    def note_trust(self, guesses: int, right: int) -> None:
        """Of so many guesses by a head, the first ``right`` were."""
        for place in range(min(guesses, right + 1)):
            self.trust[place] += TRUST_WEIGHT * ((place < right) - self.trust[place])


class Speculator:
    """Proposes tokens for one answer.

    Args:
        prompt: its token ids.
        costs: of the engine's steps.
        barred: a token that is never proposed, since the model cannot read it alone.
        again: after a wrong guess the next step computes the right tokens once more, as linear attention's must.
        ahead: of the model's head for multi-token prediction, which guesses where the text does not repeat itself.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        costs: Costs,
        barred: int | None = None,
        *,
        again: bool = False,
        ahead: Ahead | None = None,
    ) -> None:
        self._drafts, self._costs, self._barred, self._again = Drafts(prompt), costs, barred, again
        self._in_hand, self._ahead = ALLOWANCE, ahead
        # what the guesses cost that a head made for the step that is under way
        self._drafted = 0.0

    def propose(self, most: int) -> list[int]:
        """Tokens to compute beside the one that is due, ``most`` at most; none when a plain step is worth more."""
        self._drafted = 0.0
        guess = self._allowed(self._drafts.guess(min(most, WIDTHS[-1] - 1)))
        width = self._width(self._drafts.gain(len(guess)))
        return guess[: width - 1] if width > 1 else self._by_head(most)

    def _allowed(self, guess: list[int]) -> list[int]:
        return guess[: guess.index(self._barred)] if self._barred in guess else guess

    def _width(self, gain: list[float], each: float = 0.0) -> int:
        """Tokens of the step that gives most for its cost.

        Args:
            gain: see ``Drafts.gain``; each: plain steps that a guess costs.
        """
        best, width = LEAST_GAIN, 1
        for wider in WIDTHS:
            if wider > len(gain):
                break
            cost = self._costs.of(wider) + self._repeated(gain, wider) + each * (wider - 1)
            if cost - 1 <= self._in_hand and gain[wider - 1] / cost > best:
                best, width = gain[wider - 1] / cost, wider
        return width

    def _by_head(self, most: int) -> list[int]:
        """What the head guesses; it is asked now and then where it was not worth it, since texts change."""
        if self._ahead is None or most < 1:
            return []
        trust, gain = self._costs.trust, [1.0]
        for place in range(min(most, DRAFTED)):
            gain.append(gain[-1] + math.prod(trust[: place + 1]))
        width = self._width(gain, self._costs.draft)
        if width == 1 and self._in_hand < TRIAL:
            return []
        count, begin = max(width - 1, 1), time.perf_counter()
        guess = self._ahead.guess(self._drafts.text, count)
        if guess:
            self._drafted = self._costs.note_draft(len(guess), time.perf_counter() - begin)
        return self._allowed(guess)

    def saw(self, position: int, hidden: Floats) -> None:
        """See ``Ahead.saw``."""
        if self._ahead is not None:
            self._ahead.saw(position, hidden)

    def _repeated(self, gain: list[float], width: int) -> float:
        """Plain steps that a step of ``width`` is expected to cost afterwards."""
        if not self._again:
            return 0.0
        right = gain[width - 1] - gain[width - 2]
        return (1 - right) * (self._costs.of(1 + round(gain[width - 1])) - 1)

    def hear(self, token: int) -> None:
        """The answer goes on with ``token``."""
        self._drafts.hear(token)
        self._in_hand = min(self._in_hand + ACCRUAL, MOST)

    def settle(self, proposed: int, right: int, again: int = 0) -> float:
        """A step with ``proposed`` guessed tokens is done, of which so many were right; what it cost in plain steps.

        Args:
            again: tokens that the next step computes once more.
        """
        cost = self._costs.of(1 + proposed) + self._costs.of(1 + again) - 1 + self._drafted
        if self._drafted:
            self._costs.note_trust(proposed, right)
        self._in_hand = min(self._in_hand + 1 + right - cost, MOST)
        return cost
