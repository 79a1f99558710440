"""What a model thinks, apart from what it answers: Qwen3 and QwQ put their reasoning between think tags.

https://huggingface.co/Qwen/Qwen3-8B#switching-between-thinking-and-non-thinking-mode
"""

from __future__ import annotations

from typing import Literal

from qwen_onnx.runtime.processing.tails import begun

OPEN, CLOSE = "<think>", "</think>"

Kind = Literal["reasoning", "content"]
Piece = tuple[Kind, str]


def is_open(prompt: str) -> bool:
    """Whether a prompt ends within reasoning, as the templates of thinking-only models have it."""
    return prompt.rstrip().endswith(OPEN)


class ThinkingSplitter:
    """Parts a streamed answer at its think tags. How the text is cut into pushes changes nothing.

    Only a block at the very beginning is reasoning; later tags are text that the model writes about. The newlines
    around the block belong to the tags and are dropped.

    Args:
        inside: the prompt already ended with the opening tag; see ``is_open``.
    """

    def __init__(self, inside: bool = False) -> None:
        self._state: Literal["start", "reasoning", "content"] = "reasoning" if inside else "start"
        self._held = ""
        self._trim = inside

    def push(self, text: str) -> list[Piece]:
        """The pieces that became certain with ``text``; none of them is empty."""
        self._held += text
        pieces: list[Piece] = []
        if self._state == "start":
            self._begin()
        if self._state == "reasoning":
            pieces += self._reason()
        if self._state == "content":
            pieces += self._release("content", len(self._trimmed()))
        return pieces

    def flush(self) -> list[Piece]:
        """What was held back, at the end of the answer."""
        if self._state == "reasoning":
            return self._release("reasoning", len(self._trimmed().rstrip("\n")))
        return self._release("content", len(self._trimmed()))

    def _begin(self) -> None:
        visible = self._held.lstrip()
        if visible.startswith(OPEN):
            self._state, self._held, self._trim = "reasoning", visible[len(OPEN) :], True
        elif not OPEN.startswith(visible):
            self._state = "content"

    def _reason(self) -> list[Piece]:
        text = self._trimmed()
        end = text.find(CLOSE)
        if end < 0:
            return self._release("reasoning", len(text[: len(text) - begun(text, [CLOSE])].rstrip("\n")))
        pieces = self._release("reasoning", len(text[:end].rstrip("\n")))
        self._held = text[end + len(CLOSE) :]
        self._state, self._trim = "content", True
        return pieces

    def _trimmed(self) -> str:
        if self._trim:
            self._held = self._held.lstrip("\n")
            self._trim = not self._held
        return self._held

    def _release(self, kind: Kind, count: int) -> list[Piece]:
        text, self._held = self._held[:count], self._held[count:]
        return [(kind, text)] if text else []
