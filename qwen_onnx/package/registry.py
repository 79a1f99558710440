"""The registry of the rules that a package must keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qwen_onnx.package.contents import Contents

Find = Callable[[Contents], Iterable[str]]


@dataclass(frozen=True)
class Rule:
    """``find`` yields one text per fault; it may raise ``Unreadable``, which the rule ``readable`` tells."""

    name: str
    reason: str
    find: Find


RULES: dict[str, Rule] = {}


def rule(name: str, reason: str) -> Callable[[Find], Find]:
    """Register a function as the rule ``name``; ``reason`` says in one sentence what breaking it does."""

    def register(find: Find) -> Find:
        RULES[name] = Rule(name, reason, find)
        return find

    return register
