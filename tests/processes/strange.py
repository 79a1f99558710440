"""A child that does what it is asked, whatever that is."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from qwen_onnx.processes.limited import serve


def answer(question: dict[str, Any]) -> Any:
    kind, value = question["kind"], question.get("value")
    try:
        return {
            "echo": lambda: value,
            "pid": os.getpid,
            "fill": lambda: len(b"a" * value),
            "spin": _spin,
            "sleep": lambda: time.sleep(value),
            "exit": lambda: os._exit(value),
            "write": lambda: Path(value).write_text("x"),
            "read": lambda: Path(value).read_text(),
            "connect": lambda: socket.create_connection(("127.0.0.1", value)).close(),
            "variable": lambda: os.environ.get(value),
        }[kind]()
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror}"


def _spin() -> None:
    while True:
        pass


def main() -> None:
    """Under limits."""
    serve(answer)
