"""What long work says while it goes on: records of one logger, which nobody sees unless somebody listens.

A library's user attaches a handler to ``logging.getLogger("qwen_onnx.progress")``, or listens as the command line does.
A child says its lines to its parent, which says them again here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOGGER = logging.getLogger("qwen_onnx.progress")


def progress(message: str) -> None:
    """One line at the start of each part."""
    LOGGER.info("%s", message)


class _Listening(logging.Handler):
    def __init__(self, listener: Callable[[str], None]) -> None:
        super().__init__()
        self._listener = listener

    def emit(self, record: logging.LogRecord) -> None:
        self._listener(record.getMessage())


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Tell ``listener`` every line meanwhile, and the handlers of other loggers none of them."""
    handler, before = _Listening(listener), (LOGGER.level, LOGGER.propagate)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(before[0])
        LOGGER.propagate = before[1]
