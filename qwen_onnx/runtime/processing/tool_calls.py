"""Finds tool calls in an answer as it comes, in the Hermes format of Qwen2.5 and Qwen3:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Köln"}}
    </tool_call>

https://github.com/NousResearch/Hermes-Function-Calling#prompt-format-for-function-calling
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from qwen_onnx.runtime.processing.tails import begun

OPEN, CLOSE = "<tool_call>", "</tool_call>"
HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"arguments"\s*:\s*')


@dataclass(frozen=True)
class Text:
    """Content beside the calls."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins; calls are numbered from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of a call's arguments, which are a JSON object."""

    index: int
    text: str


CallEvent = Text | CallStart | CallArguments


class ToolCallParser:
    """Parts an answer into text and calls. How the text is cut into pushes changes nothing but the cuts of the events.

    What begins like a call and is none stays text. White space around calls is dropped, a missing end tag forgiven.

    Args:
        names: functions that exist.
        trusted: a grammar keeps calls well formed, so their arguments may be passed on before the end is seen.
    """

    def __init__(self, names: Collection[str], *, trusted: bool) -> None:
        self._names, self._trusted = frozenset(names), trusted
        self._held = ""
        self._events: list[CallEvent] = []
        self._state: Literal["text", "call", "closing", "after"] = "text"
        self._gap, self._call = "", _Call()
        # how many calls have begun
        self.calls = 0

    def push(self, text: str) -> list[CallEvent]:
        """The events that became certain with ``text``."""
        self._held += text
        steps = {"text": self._find, "call": self._read, "closing": self._close, "after": self._skip}
        while self._held and steps[self._state]():
            pass
        return self._taken()

    def flush(self) -> list[CallEvent]:
        """What was held back, at the end of the answer; a call that is cut before it is understood is text."""
        if self._state == "call" and not self._call.started:
            self._say(self._gap + OPEN + self._call.body)
        elif self._state == "text":
            self._say(self._held)
        self._held, self._state = "", "text"
        return self._taken()

    def _taken(self) -> list[CallEvent]:
        events, self._events = self._events, []
        return events

    def _say(self, text: str) -> None:
        if text:
            self._events.append(Text(text))

    def _find(self) -> bool:
        begin = self._held.find(OPEN)
        if begin >= 0:
            said = self._held[:begin].rstrip()
            self._say(said)
            self._gap, self._call = self._held[len(said) : begin], _Call()
            self._held, self._state = self._held[begin + len(OPEN) :], "call"
            return True
        # white space before a call is dropped: it waits until it is known what follows
        certain = self._held[: len(self._held) - begun(self._held, [OPEN])].rstrip()
        self._say(certain)
        self._held = self._held[len(certain) :]
        return False

    def _read(self) -> bool:
        call, piece = self._call, ""
        for position, character in enumerate(self._held):
            if call.ends_before(character):
                self._held, self._state = self._held[position:], "text"
                self._arguments(piece)
                if not call.started:
                    self._say(self._gap + OPEN + call.body)
                return True
            if self._trusted and call.begins_arguments(character, self._names):
                self._begin(call.name)
            inside = call.take(character)
            piece += character if inside else ""
            if call.complete:
                self._held = self._held[position + 1 :]
                self._arguments(piece)
                self._finish(call)
                return True
        self._held = ""
        self._arguments(piece)
        return False

    def _begin(self, name: str) -> None:
        self._events.append(CallStart(self.calls, name))
        self.calls += 1

    def _arguments(self, piece: str) -> None:
        if piece:
            self._events.append(CallArguments(self.calls - 1, piece))

    def _finish(self, call: _Call) -> None:
        self._state = "closing"
        if call.started:
            return
        understood = call.parsed(self._names)
        if understood is None:
            self._state = "text"
            self._say(self._gap + OPEN + call.body)
            return
        self._begin(understood[0])
        self._arguments(understood[1])

    def _close(self) -> bool:
        visible = self._held.lstrip()
        if visible.startswith(CLOSE):
            self._held, self._state = visible[len(CLOSE) :], "after"
            return True
        if CLOSE.startswith(visible):
            return False
        self._state = "after"
        return True

    def _skip(self) -> bool:
        self._held = self._held.lstrip()
        self._state = "text" if self._held else "after"
        return bool(self._held)


class _Call:
    """The object of a call as it is read, character by character."""

    def __init__(self) -> None:
        self.body, self.name = "", ""
        self.started, self.complete = False, False
        # open braces and brackets
        self._depth = 0
        self._in_string, self._escaped = False, False

    def ends_before(self, character: str) -> bool:
        """Whether no JSON object goes on with ``character``."""
        if self._depth == 0:
            return character != "{" and not character.isspace()
        return character == "<" and not self._in_string

    def begins_arguments(self, character: str, names: Collection[str]) -> bool:
        """Whether with ``character`` the arguments of a known function begin."""
        if self.started or character != "{" or self._depth != 1 or self._in_string:
            return False
        head = HEAD.fullmatch(self.body.strip())
        if head and head[1] in names:
            self.name, self.started = head[1], True
        return self.started

    def take(self, character: str) -> bool:
        """Go on by ``character``; returns whether it belongs to arguments that were begun."""
        before = self._depth
        self.body += character
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.complete = self._depth == 0
        return self.started and max(before, self._depth) > 1

    def parsed(self, names: Collection[str]) -> tuple[str, str] | None:
        """Name and arguments of a complete call; None when it is no call of a known function."""
        try:
            call = json.loads(self.body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
            return None
        name, arguments = call["name"], call["arguments"]
        if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
            return None
        return name, json.dumps(arguments, ensure_ascii=False)
