"""Grammars, in llguidance's Lark, for answers that are JSON, tool calls or both.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llguidance import LLMatcher

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.processing import reasoning, tool_calls

# a model that is not sure would else write blanks until its tokens are spent
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{0,40}"
ANY_OBJECT: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class Calls:
    """The calls that an answer may hold.

    Args:
        parameters: function name to JSON schema of its arguments.
        forced: the answer is calls and nothing else.
        several: more than one.
    """

    parameters: Mapping[str, Mapping[str, Any]]
    forced: bool = False
    several: bool = True


def check_schema(schema: Mapping[str, Any], where: str) -> None:
    """RequestError, in llguidance's words, for a schema that is faulty or that it cannot hold to."""
    try:
        check_grammar(LLMatcher.grammar_from_json_schema(_compact(schema)), where)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the schema is refused: {error}", where=where) from error


def check_grammar(grammar: str, where: str) -> None:
    """RequestError, in llguidance's words, for a grammar that it refuses."""
    fault = LLMatcher.validate_grammar(grammar)
    if fault and not fault.startswith("WARNING"):
        raise RequestError(f"the schema is refused: {fault}", where=where)


def _compact(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}})


class Grammar:
    """Writes grammars for a vocabulary.

    Args:
        added: tokens of the vocabulary that are never the sum of others. Where a tag is one of them a model that
            knows it gives that token, and llguidance tells it from the same characters: it goes in by its id.
    """

    def __init__(self, added: Mapping[str, int]) -> None:
        self._added = added

    def answer(
        self, schema: Mapping[str, Any] | None, calls: Calls | None, thinking: Literal["no", "may", "inside"]
    ) -> str:
        """The grammar of a whole answer.

        Args:
            schema: of the content; None: any text.
            calls: beside or, with a schema, instead of the content.
            thinking: whether reasoning may stand before it; inside: the prompt has opened it already.
        """
        rules = [f"WS: /{WHITE_SPACE}/", r"TEXT: /(.|\n)*/"]
        before = {"no": "", "may": "think? ", "inside": "thought "}[thinking]
        if thinking != "no":
            rules += self._ended("thought", reasoning.CLOSE, after="WS")
            rules.append(f"think: WS {self._tag(reasoning.OPEN)} thought")
        content = f"%json {_compact(schema)}" if schema is not None else "TEXT"
        if calls is None:
            start = content
        else:
            rules += self._calls(calls)
            start = self._with_calls(calls, content, schema is not None)
        return "\n".join(["%llguidance {}", f"start: {before}body", f"body: {start}", *rules]) + "\n"

    def _with_calls(self, calls: Calls, content: str, is_json: bool) -> str:
        following = "(WS call)*" if calls.several else ""
        if calls.forced:
            return f"call {following}"
        if is_json:
            return f"{content} | call {following}"
        return "called* TEXT" if calls.several else "TEXT | called"

    def _calls(self, calls: Calls) -> list[str]:
        functions = [
            f"{json.dumps(chr(10) + json.dumps({'name': name})[:-1] + ', ' + json.dumps('arguments') + ': ')}"
            f" %json {_compact(schema)} {json.dumps('}' + chr(10))}"
            for name, schema in calls.parameters.items()
        ]
        end = self._tag(tool_calls.CLOSE)
        return [
            *(f"function_{index}: {rule}" for index, rule in enumerate(functions)),
            "function: " + " | ".join(f"function_{index}" for index in range(len(functions))),
            f"call: {self._tag(tool_calls.OPEN)} function {end}",
            *self._ended("begun", tool_calls.OPEN),
            f"called: begun function {end}",
        ]

    def _tag(self, tag: str) -> str:
        return f"<[{self._added[tag]}]>" if tag in self._added else json.dumps(tag)

    def _ended(self, rule: str, tag: str, after: str = "") -> list[str]:
        """Text up to and with a tag; text cannot hold added tokens, but it could hold a tag that is spelled."""
        if tag in self._added:
            return [f"{rule}: TEXT {self._tag(tag)} {after}"]
        return [f"{rule}_text[lazy]: TEXT {json.dumps(tag)}", f"{rule}: {rule}_text {after}"]
