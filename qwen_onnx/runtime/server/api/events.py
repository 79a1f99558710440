"""One core for streamed and whole answers: the engine's deltas become events, and a whole answer is their fold."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from qwen_onnx.runtime.processing.reasoning import Piece, ThinkingSplitter
from qwen_onnx.runtime.processing.tool_calls import CallArguments, CallEvent, CallStart, Text, ToolCallParser
from qwen_onnx.runtime.service.generation import Delta, TokenLogprob

Finish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thinks."""

    text: str


@dataclass(frozen=True)
class End:
    """Why the answer ended; ``last`` has the counts."""

    reason: Finish
    last: Delta
    reasoning_tokens: int


Event = Reasoning | CallEvent | End


@dataclass(frozen=True)
class Step:
    """An event, and log probabilities that became certain no later than it."""

    event: Event
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Reading:
    """How to read an answer.

    Args:
        thinks: the model knows think tags; a block of them at the beginning is reasoning.
        inside: the prompt has opened the reasoning already.
        functions: names of functions that may be called; empty: none, calls are text.
        trusted: a grammar keeps calls well formed.
    """

    thinks: bool = False
    inside: bool = False
    functions: Collection[str] = ()
    trusted: bool = False


class Reader:
    """Makes events of one answer's deltas."""

    def __init__(self, reading: Reading) -> None:
        self._thoughts = ThinkingSplitter(reading.inside) if reading.thinks else None
        self._calls = ToolCallParser(reading.functions, trusted=reading.trusted) if reading.functions else None
        self._logprobs: tuple[TokenLogprob, ...] = ()
        self._reasoning_tokens = 0

    def feed(self, delta: Delta) -> list[Step]:
        """The steps that became certain; the last delta gives an ``End`` as the last of them."""
        self._logprobs += delta.logprobs
        plain: list[Piece] = [("content", delta.text)] if delta.text else []
        events = self._read(self._thoughts.push(delta.text) if self._thoughts else plain, delta)
        if delta.finish_reason:
            events += self._read(self._thoughts.flush() if self._thoughts else [], delta)
            if self._calls:
                events += self._calls.flush()
            called = self._calls is not None and self._calls.calls > 0
            reason: Finish = "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason
            events.append(End(reason, delta, self._reasoning_tokens))
        if not events:
            return []
        logprobs, self._logprobs = self._logprobs, ()
        return [Step(events[0], logprobs), *map(Step, events[1:])]

    def _read(self, pieces: list[Piece], delta: Delta) -> list[Event]:
        events: list[Event] = []
        for kind, text in pieces:
            if kind == "reasoning":
                self._reasoning_tokens = delta.completion_tokens
                events.append(Reasoning(text))
            else:
                events += self._calls.push(text) if self._calls else [Text(text)]
        return events


@dataclass
class Call:
    """A whole call."""

    name: str
    arguments: str = ""


@dataclass
class Answer:
    """A whole answer: the fold of its steps."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    end: End | None = None

    def add(self, step: Step) -> None:
        """One step more."""
        self.logprobs += step.logprobs
        match step.event:
            case Reasoning(text):
                self.reasoning += text
            case Text(text):
                self.content += text
            case CallStart(_, name):
                self.calls.append(Call(name))
            case CallArguments(index, text):
                self.calls[index].arguments += text
            case End():
                self.end = step.event
