"""What a verb says while it works, on standard error: standard output is for its result."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from qwen_onnx.errors import printable


def progress(message: str) -> None:
    """One line at the start of each part."""
    Console(stderr=True).print(f"[cyan]›[/] {escape(printable(message))}", highlight=False, soft_wrap=True)
