"""The examples: JSONL of a stranger, read under limits; every line that is wrong is told, all of them together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_onnx.bounded import open_plain, read_object
from qwen_onnx.errors import TrainingError

# bytes of a line and of all; lines
LONGEST_LINE, LARGEST_FILE, MOST_LINES = 1 << 20, 4 << 30, 1_000_000
# faults that are shown
SHOWN = 40
ROLES = ("system", "user", "assistant")
# Windows' editors begin a file with it
MARK = b"\xef\xbb\xbf"
# the key of a line that is not learnt: the base's distribution over its tokens is kept
RETAIN = "retain"
FORMS = (
    'a line is {"messages": [{"role": …, "content": …}, …]} or {"instruction": …, "input": …, "output": …}; '
    'or, to keep the base\'s behaviour, {"retain": TEXT} or {"retain": [{"role": …, "content": …}, …]}'
)

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """A conversation that ends with an answer.

    Attributes:
        line: of the file that it stands in.
    """

    line: int
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Retained:
    """A plain text or a conversation on which the model shall stay what it was."""

    line: int
    said: str | tuple[Message, ...]


@dataclass(frozen=True)
class Data:
    """The examples of a file, what is retained, and the SHA-256 of the file's bytes."""

    examples: tuple[Example, ...]
    retained: tuple[Retained, ...]
    sha256: str


def read_data(path: Path) -> Data:
    """Read the examples; empty lines are passed over.

    Raises:
        TrainingError: the file is missing, not plain, too large or empty, or lines are wrong: each with its number.
    """
    found: list[Example | Retained] = []
    faults, digest = Faults(path), hashlib.sha256()
    for number, read in _lines(path):
        digest.update(read)
        line = read.removeprefix(MARK) if number == 1 else read
        if not (found or faults) and line.lstrip().startswith(b"["):
            hint = f"a line for each example: jq -c '.[]' {path.name} > {path.stem}.jsonl"
            raise TrainingError("a JSON array, not JSONL", where=str(path), hint=hint)
        if line.strip():
            try:
                found.append(_example(number, line))
            except TrainingError as error:
                faults.add(number, error.what)
    faults.require_none("cannot be learnt from", FORMS)
    examples = tuple(line for line in found if isinstance(line, Example))
    if not examples:
        raise TrainingError("the file holds no example", where=str(path), hint=FORMS)
    return Data(examples, tuple(line for line in found if isinstance(line, Retained)), digest.hexdigest())


class Faults:
    """Lines of ``path`` that are wrong, all told at once."""

    def __init__(self, path: Path) -> None:
        self._path, self._found = path, dict[int, str]()

    def add(self, line: int, what: str) -> None:
        """Line ``line`` is wrong, the first reason counts."""
        self._found.setdefault(line, what)

    def __bool__(self) -> bool:
        return bool(self._found)

    def require_none(self, what: str, hint: str) -> None:
        """TrainingError with every line, when there are some."""
        count = len(self._found)
        if not count:
            return
        told = [f"\n  - line {line}: {self._found[line]}" for line in sorted(self._found)[:SHOWN]]
        rest = f"\n  - and {count - SHOWN} more" if count > SHOWN else ""
        lines = "1 line" if count == 1 else f"{count} lines"
        raise TrainingError(f"{lines} {what}:{''.join(told)}{rest}", where=str(self._path), hint=hint)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers from 1, none longer than may be."""
    total = 0
    with open_plain(path, TrainingError, hint=FORMS) as file:
        for number in range(1, MOST_LINES + 2):
            line = file.readline(LONGEST_LINE + 1)
            if not line:
                return
            total += len(line)
            if len(line) > LONGEST_LINE or total > LARGEST_FILE or number > MOST_LINES:
                limits = f"{LONGEST_LINE:,} bytes a line, {MOST_LINES:,} lines and {LARGEST_FILE:,} bytes in all"
                what = f"line {number} passes a limit: {limits}"
                raise TrainingError(what, where=str(path), hint="split the file, or the example")
            yield number, line


def _example(number: int, line: bytes) -> Example | Retained:
    example = read_object(line, most_bytes=LONGEST_LINE, error=TrainingError, what="it")
    if RETAIN not in example:
        return Example(number, _messages(example))
    _require_keys(example, {RETAIN}, set())
    said = example[RETAIN]
    return Retained(number, _conversation(said) if isinstance(said, list) else _text(example, RETAIN))


def _messages(example: dict[str, Any]) -> tuple[Message, ...]:
    if "messages" in example:
        _require_keys(example, {"messages"}, set())
        return _conversation(example["messages"])
    _require_keys(example, {"instruction", "output"}, {"input"})
    texts = {key: _text(example, key) for key in ("instruction", "output")}
    # an empty input is how these files say that there is none
    given = example.get("input") or ""
    if not isinstance(given, str):
        raise TrainingError("input is not a text")
    asked = f"{texts['instruction']}\n\n{given}" if given.strip() else texts["instruction"]
    return ({"role": "user", "content": asked}, {"role": "assistant", "content": texts["output"]})


def _conversation(turns: Any) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise TrainingError("messages is not a list of messages")
    found: list[Message] = []
    for number, turn in enumerate(turns, 1):
        try:
            found.append(_message(turn))
        except TrainingError as error:
            raise TrainingError(f"message {number}: {error.what}") from error
    roles = [turn["role"] for turn in found]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2) or not spoken:
        order = "one system message at most, then user and assistant in turns, an answer last"
        raise TrainingError(f"roles out of order: {', '.join(roles[:12])}; {order}")
    return tuple(found)


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise TrainingError("it is not an object")
    _require_keys(turn, {"role", "content"}, set())
    role = turn["role"]
    if role not in ROLES:
        raise TrainingError(f"the role is {str(role)[:40]!r}, not {', '.join(ROLES)}")
    return {"role": str(role), "content": _text(turn, "content")}


def _require_keys(value: Mapping[str, Any], needed: set[str], allowed: set[str]) -> None:
    missing, unknown = sorted(needed - value.keys()), sorted(value.keys() - needed - allowed)
    if missing or unknown:
        told = [f"{name} is missing" for name in missing] + [f"unknown key {name[:40]!r}" for name in unknown[:8]]
        raise TrainingError("; ".join(told))


def _text(value: Mapping[str, Any], key: str) -> str:
    found = value[key]
    if not isinstance(found, str) or not found.strip():
        raise TrainingError(f"{key} is not a text, or an empty one")
    return found
