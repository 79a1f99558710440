"""What all requests together may hold, and which of them may bring something at all."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


class Budget:
    """Bytes of bodies in memory, of all requests together.

    Args:
        most: of them at once.
    """

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0

    @contextmanager
    def share(self) -> Iterator[Share]:
        """What one request takes, given back when it ends."""
        share = Share(self)
        try:
            yield share
        finally:
            self.used -= share.taken


@dataclass
class Share:
    """Of one request."""

    budget: Budget
    taken: int = 0

    def take(self, count: int) -> bool:
        """Count ``count`` bytes; false when that is more than there is room for."""
        if self.budget.used + count > self.budget.most:
            return False
        self.budget.used += count
        self.taken += count
        return True


def declares_body(headers: Mapping[str, str]) -> bool:
    """Whether a request says that a body follows."""
    return headers.get("content-length", "0").strip("0") != "" or "transfer-encoding" in headers


def is_foreign(headers: Mapping[str, str], origins: Collection[str]) -> bool:
    """Whether a browser says that a page from elsewhere sends this, and none of ``origins``.

    A page of another port of this machine counts as elsewhere: what is served here is not told by its neighbours.
    https://www.w3.org/TR/fetch-metadata/
    """
    elsewhere = headers.get("sec-fetch-site", "none").strip().lower() not in ("same-origin", "none")
    return elsewhere and not ("*" in origins or headers.get("origin", "") in origins)
