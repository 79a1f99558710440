"""What may come next in a text that repeats itself: prompt lookup (Saxena 2023, github.com/apoorvumang)."""

from __future__ import annotations

from collections.abc import Sequence

# tokens at the end of a text that are looked for earlier in it, the most telling first
ORDERS = (8, 4, 2)
# how often a guess by so many tokens is taken to be right before there is any, and what each guess then weighs
RATES = {8: 0.8, 4: 0.6, 2: 0.3}
WEIGHT = 0.2


class Drafts:
    """Guesses the next tokens of one text, and learns how often it is right.

    Every token is guessed before it is heard, whether or not somebody asked for the guess: so what is known of a text
    costs no step of the model.

    Args:
        text: token ids that stand already.
    """

    def __init__(self, text: Sequence[int]) -> None:
        self._text: list[int] = []
        # hash of n tokens -> where in the text what came behind them begins; the latest place wins. Tokens that share
        # a hash make a wrong guess, no wrong answer, and a third of the memory is saved
        self._behind: dict[int, dict[int, int]] = {order: {} for order in ORDERS}
        self._rates = dict(RATES)
        for token in text:
            self._add(token)
        self._order, self._next = self._looked_up()

    @property
    def text(self) -> list[int]:
        """All tokens so far; not to be changed."""
        return self._text

    def hear(self, token: int) -> None:
        """The next token of the text, whoever chose it."""
        if self._order:
            hit = self._text[self._next] == token
            self._rates[self._order] += WEIGHT * (hit - self._rates[self._order])
        self._add(token)
        self._order, self._next = self._looked_up()

    def guess(self, most: int) -> list[int]:
        """At most ``most`` tokens that may come next; what reaches the end of the text goes on in circles."""
        if not self._order:
            return []
        period = len(self._text) - self._next
        return [self._text[self._next + index % period] for index in range(most)]

    def gain(self, most: int) -> list[float]:
        """Tokens that a step is expected to give with the first 0, 1, ... ``most`` of the guess.

        As many of them count as are right one after the other; the longer they agree, the likelier is the next.
        """
        expected, chance = [1.0], 1.0
        for index in range(most if self._order else 0):
            agreed = self._order + index
            chance *= self._rates[next(order for order in ORDERS if order <= agreed)]
            expected.append(expected[-1] + chance)
        return expected

    def _looked_up(self) -> tuple[int, int]:
        """How many of the last tokens stand earlier too, and where that goes on; 0: none."""
        for order in ORDERS:
            found = self._behind[order].get(hash(tuple(self._text[-order:])))
            if found is not None:
                return order, found
        return 0, 0

    def _add(self, token: int) -> None:
        """Append; the very end of the text is in no index, so that a look-up finds an earlier place."""
        for order in ORDERS:
            if len(self._text) >= order:
                self._behind[order][hash(tuple(self._text[-order:]))] = len(self._text)
        self._text.append(token)
