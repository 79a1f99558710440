"""How many answers one client may have under way, so that the others find a place too."""

from __future__ import annotations

import threading


class Slots:
    """How many generations each client has under way; thread-safe.

    Args:
        most: for each client; None: as many as the engine takes.
    """

    def __init__(self, most: int | None) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._held: dict[str, int] = {}

    def take(self, client: str | None) -> bool:
        """One more for ``client``; false when it has all that it may. Whoever has no name is not counted."""
        if client is None or self.most is None:
            return True
        with self._lock:
            held = self._held.get(client, 0)
            if held >= self.most:
                return False
            self._held[client] = held + 1
        return True

    def give(self, client: str | None) -> None:
        """One that ``take`` allowed has ended."""
        if client is None or self.most is None:
            return
        with self._lock:
            self._held[client] -= 1
            if not self._held[client]:
                del self._held[client]
