"""Which conversation stands in which row, and what rows remember for those that come after."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# a shorter common beginning is computed anew: copying saves nothing
LEAST_PREFIX = 16


class Rows:
    """Rows in use are neighbours, so that they make one batch; the others keep what they held, as a prefix cache.

    ``histories[row]`` are the tokens whose keys and values stand in the row, and ``scopes[row]`` is whose they are:
    nobody finds a prefix that another scope left.

    Args:
        count: of the rows.
        resumable: how much of a row's first so many tokens it can go on behind.
    """

    def __init__(self, count: int, resumable: Callable[[int, int], int] = lambda _, tokens: tokens) -> None:
        self._resumable = resumable
        self.histories: list[list[int]] = [[] for _ in range(count)]
        self.scopes = [""] * count
        self._used_at = [0] * count
        self._clock = 0
        self.taken: set[int] = set()

    def admit(self, prompt: Sequence[int], scope: str = "", *, reuse: bool = True) -> int | None:
        """Take a row for a ``prompt`` of ``scope``; None when all are taken.

        Its history is what it keeps for the prompt: at least one token of the prompt is left to compute. ``reuse``
        false keeps nothing.
        """
        candidates = self._candidates()
        if not candidates:
            return None
        kept = {row: self._kept(prompt, row, scope) if reuse else 0 for row in candidates}
        row = max(candidates, key=lambda row: (kept[row], -self._used_at[row]))
        del self.histories[row][kept[row] :]
        self.scopes[row] = scope
        self.taken.add(row)
        self.touch(row)
        return row

    def longest(self, prompt: Sequence[int], row: int) -> tuple[int, int]:
        """Which other row of the same scope shares the longest beginning with ``prompt``, and its tokens.

        0: copying saves nothing.
        """
        scope = self.scopes[row]
        others = [(self._kept(prompt, other, scope), other) for other in range(len(self.histories)) if other != row]
        tokens, source = max(others, default=(0, row))
        return (source, tokens) if tokens >= len(self.histories[row]) + LEAST_PREFIX else (row, 0)

    def shared(self, prompt: Sequence[int], scope: str = "") -> int:
        """Tokens of ``prompt`` that stand in some row of its scope, whether or not one can go on behind them."""
        return max(self._found(prompt, row, scope) for row in range(len(self.histories)))

    def _kept(self, prompt: Sequence[int], row: int, scope: str) -> int:
        return self._resumable(row, self._found(prompt, row, scope))

    def _found(self, prompt: Sequence[int], row: int, scope: str) -> int:
        """Tokens of ``prompt`` that stand in the row, if the row is of that scope."""
        return _common(prompt, self.histories[row]) if self.scopes[row] == scope else 0

    def _candidates(self) -> list[int]:
        """Free rows beside those in use, or any when none is in use."""
        if not self.taken:
            return list(range(len(self.histories)))
        ends = (min(self.taken) - 1, max(self.taken) + 1)
        return [row for row in ends if 0 <= row < len(self.histories)]

    def touch(self, row: int) -> None:
        """Remember that the row was used just now."""
        self._clock += 1
        self._used_at[row] = self._clock

    def release(self, row: int) -> int | None:
        """Free ``row``. When that leaves a gap: the row at an end that should move there; see ``move``."""
        self.taken.discard(row)
        if not self.taken or not min(self.taken) < row < max(self.taken):
            return None
        return min((min(self.taken), max(self.taken)), key=lambda end: len(self.histories[end]))

    def move(self, source: int, target: int) -> None:
        """Note that a conversation was copied; what it left behind stays a prefix."""
        self.taken.discard(source)
        self.taken.add(target)
        self.histories[target], self.scopes[target] = list(self.histories[source]), self.scopes[source]
        self.touch(target)


def _common(prompt: Sequence[int], history: Sequence[int]) -> int:
    """Length of the common beginning, short of the whole prompt."""
    most = min(len(prompt) - 1, len(history))
    return next((index for index in range(most) if prompt[index] != history[index]), max(most, 0))
