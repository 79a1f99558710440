"""What the JSON of one request may hold. It is counted before anything else works on it: whoever validates a list
makes a record of each fault in it, and a body of a few megabytes has room for a million.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from qwen_onnx.errors import RequestError

# a string, whole or cut off by the end of the body; it never backtracks, so its time is that of one pass
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
# fields whose value is a JSON schema, and the one that may be token ids
SCHEMAS, IDS = frozenset({"parameters", "schema"}), "prompt"


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
    """

    values: int = 65_536
    ids: int = 1 << 20
    items: int = 4096
    members: int = 2048
    name: int = 256
    schema: int = 64 << 10
    enum: int = 512

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
        # value, the field that it belongs to, whether it is part of a schema
        waiting: list[tuple[Any, str, bool]] = [(body, "", False)]
        while waiting:
            value, field, schema = waiting.pop()
            self._count(value, field, schema)
            if isinstance(value, dict):
                for name, inner in value.items():
                    self._name(name, field, schema)
                    place = field or name
                    waiting.append((inner, place, schema or (name in SCHEMAS and isinstance(inner, dict))))
                    if schema and name == "enum" and isinstance(inner, list):
                        self._refuse(len(inner), self._budget.enum, "values in an enum", place)
            elif isinstance(value, list) and not (field == IDS and self._are_ids(value)):
                self._refuse(len(value), self._budget.items, "items in a list", field)
                waiting += [(item, field, schema) for item in value]

    def _count(self, value: Any, field: str, schema: bool) -> None:
        self._values += 1
        self._refuse(self._values, self._budget.values, "values", None)
        if isinstance(value, dict):
            self._refuse(len(value), self._budget.members, "members in an object", field)
        if schema:
            self._in_schema(1 + (len(value) if isinstance(value, str) else 0), field)

    def _name(self, name: str, field: str, schema: bool) -> None:
        self._refuse(len(name), self._budget.name, "characters in a name", field)
        if schema:
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


BUDGET = Budget()
