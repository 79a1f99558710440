"""Marks that a stream of text may be in the middle of. The work is linear in the text, however long a mark is."""

from __future__ import annotations

from collections.abc import Iterable


class Search:
    """Looks for a mark in text that comes in pieces: Knuth, Morris and Pratt 1977. Each character is looked at once.

    Args:
        mark: not empty.
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark
        # for each beginning of the mark, its longest proper beginning that it also ends with
        self._shorter = [0]
        self.begun = 0
        for character in mark[1:]:
            self._shorter.append(self._next(character, self._shorter[-1]))

    def push(self, text: str) -> int | None:
        """Where in ``text`` the mark ends for the first time, as an index behind it; None: it does not yet.

        ``begun`` is how many characters of the mark the text so far ends with; less than the whole.
        """
        for index, character in enumerate(text):
            self.begun = self._next(character, self.begun)
            if self.begun == len(self._mark):
                self.begun = self._shorter[-1]
                return index + 1
        return None

    def _next(self, character: str, begun: int) -> int:
        while begun and (begun == len(self._mark) or self._mark[begun] != character):
            begun = self._shorter[begun - 1]
        return begun + (self._mark[begun] == character)


def begun(text: str, marks: Iterable[str]) -> int:
    """Length of the longest tail of ``text`` that is the beginning, short of the whole, of one of ``marks``."""
    longest = 0
    for mark in marks:
        search = Search(mark)
        rest = text[-len(mark) :]
        while (end := search.push(rest)) is not None:
            rest = rest[end:]
        longest = max(longest, search.begun)
    return longest
