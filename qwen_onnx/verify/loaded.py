"""One copy of an artifact's weights at a time: a session is dropped before the engine is loaded, and the other way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Model = TypeVar("Model")


class Loaded:
    """What has loaded an artifact.

    Args:
        alone: whether one thing at a time may hold it. Those of runners may stay: they are loaded for minutes.
    """

    def __init__(self, *, alone: bool = True) -> None:
        self._alone, self._held = alone, dict[str, Any]()

    def get(self, name: str, load: Callable[[], Model]) -> Model:
        """The one called ``name``; keep it no longer than it is used."""
        if name not in self._held:
            if self._alone:
                self.drop()
            self._held[name] = load()
        found: Model = self._held[name]
        return found

    def drop(self) -> None:
        """Let go of everything."""
        self._held.clear()
