"""What the JSON of one request may hold. It is counted before anything else works on it: whoever validates a list
makes a record of each fault in it, and a body of a few megabytes has room for a million.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from qwen_onnx.errors import RequestError

# a string, whole or cut off by the end of the body; it never backtracks, so its time is that of one pass
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
# fields whose value is a JSON schema, and the one that may be token ids
SCHEMAS, IDS = frozenset({"parameters", "schema"}), "prompt"
# in a schema: what an answer must spell, letter by letter, and words that change nothing
LITERALS = frozenset({"enum", "const"})
WORDS = frozenset({"description", "title", "$comment", "default", "example", "examples"})
Part = Literal["body", "schema", "literal", "words"]


@dataclass(frozen=True)
class Budget:
    """Limits of one request.

    Args:
        values: objects, lists, strings, numbers and literals, together; token ids of a prompt are counted apart.
        ids: token ids of its prompts.
        items: of one list.
        members: of one object; a bias for each token is the largest that makes sense.
        name: characters of a member's name.
        schema: characters of all JSON schemas of a request together: names, texts and a sign for each value.
        enum: values of one enum in a schema.
        text: characters of one text in a schema that an answer is held to, a value or a pattern: each token of the
            answer, and of those beside it, waits for as much work as that text is long.
        properties: members of one object in a schema, for the same reason.
    """

    values: int = 65_536
    ids: int = 1 << 20
    items: int = 4096
    members: int = 2048
    name: int = 256
    schema: int = 64 << 10
    enum: int = 512
    text: int = 1000
    properties: int = 256

    def check_size(self, body: bytes) -> None:
        """Refuse JSON of far too many values before a parser makes objects of them.

        Raises:
            RequestError: more than the budget has.
        """
        # without its strings every value but the first follows one of these
        signs = STRING.sub(b"", body)
        lists = signs.count(b"[") + signs.count(b"{")
        commas = signs.count(b",")
        most = self.values + (self.ids if f'"{IDS}"'.encode() in body else 0)
        if lists > self.values or commas > most:
            raise RequestError(f"the body has more than {self.values} values, side by side or nested", hint="send less")

    def check(self, value: Any) -> None:
        """Count decoded JSON, without recursion, and only as far as the budget goes.

        Raises:
            RequestError: more than the budget has; ``where`` names the list or object.
        """
        _Count(self).walk(value)


class _Count:
    """What one request has used."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._values, self._ids, self._schema = 0, 0, 0

    def walk(self, body: Any) -> None:
        """RequestError at the first limit that is passed."""
        # value, the field of the body that it belongs to, what part of a request it is
        waiting: list[tuple[Any, str, Part]] = [(body, "", "body")]
        while waiting:
            value, field, part = waiting.pop()
            self._count(value, field, part)
            if isinstance(value, dict):
                for name, inner in value.items():
                    self._name(name, field, part)
                    place = field or name
                    if part == "schema" and name == "enum" and isinstance(inner, list):
                        self._refuse(len(inner), self._budget.enum, "values in an enum", place)
                    waiting.append((inner, place, _part(name, inner, part)))
            elif isinstance(value, list) and not (field == IDS and self._are_ids(value)):
                self._refuse(len(value), self._budget.items, "items in a list", field)
                waiting += [(item, field, part) for item in value]

    def _count(self, value: Any, field: str, part: Part) -> None:
        self._values += 1
        self._refuse(self._values, self._budget.values, "values", None)
        size = len(value) if isinstance(value, str) else 0
        if part in ("schema", "literal"):
            self._refuse(size, self._budget.text, "characters in a text of a schema", field)
        if part != "body":
            self._in_schema(1 + size, field)
        if isinstance(value, dict):
            most = self._budget.members if part == "body" else self._budget.properties
            self._refuse(len(value), most, "members in an object", field)

    def _name(self, name: str, field: str, part: Part) -> None:
        self._refuse(len(name), self._budget.name, "characters in a name", field)
        if part != "body":
            self._in_schema(len(name), field)

    def _in_schema(self, characters: int, field: str) -> None:
        self._schema += characters
        self._refuse(self._schema, self._budget.schema, "characters in JSON schemas", field)

    def _are_ids(self, value: list[Any]) -> bool:
        """Whether a list is nothing but token ids; a boolean is not one. Such a list raises no faults later."""
        if not all(type(item) is int and 0 <= item < 2**31 for item in value):
            return False
        self._ids += len(value)
        self._refuse(self._ids, self._budget.ids, "token ids", IDS)
        return True

    def _refuse(self, count: int, most: int, what: str, field: str | None) -> None:
        if count > most:
            raise RequestError(f"the body has more than {most} {what}", where=field or None, hint="send less")


def _part(name: str, value: Any, part: Part) -> Part:
    """Of a member's value."""
    if part == "body":
        return "schema" if name in SCHEMAS and isinstance(value, dict) else "body"
    if part == "schema" and name in LITERALS:
        return "literal"
    # a property may have such a name too: then its value is a schema
    return "words" if part == "schema" and name in WORDS and not isinstance(value, dict) else part


BUDGET = Budget()
