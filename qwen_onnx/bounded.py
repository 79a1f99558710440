"""Files of strangers, read under limits: plain files only, a bounded size, JSON that every parser reads the same way.

A package, a checkpoint, a hub listing and an index are input from strangers. Nothing of them is opened before it is
known to be a plain file, and nothing is parsed before its size, its depth and its number of values are known.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from qwen_onnx.errors import QwenOnnxError

# no file of ours nests deeper than 12
MOST_DEPTH = 32
MOST_VALUES = 500_000
# nothing here needs more than 64 bits
MOST_DIGITS = 40
# strings; the last one may have no end, so that each byte is looked at once
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
BRACKET = re.compile(rb"[\[\]{}]")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# O_NOFOLLOW refuses a link, O_NONBLOCK does not wait for the other end of a pipe; Windows has neither
GUARDED = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

Fault = type[QwenOnnxError]
AnyRecord = TypeVar("AnyRecord", bound=BaseModel)


def open_plain(path: Path, error: Fault, *, hint: str | None = None) -> BufferedReader:
    """Open a plain file to read; a link, a pipe, a device or a folder is refused without waiting for it.

    Raises:
        error: it is missing, cannot be read, or is not a plain file.
    """
    try:
        # without O_NOFOLLOW the race stays; where it is there, this only gives the better message
        if path.is_symlink():
            raise error(f"{path.name} is not a plain file", where=str(path), hint=hint)
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | GUARDED)
    except FileNotFoundError as cause:
        raise error(f"{path.name} is missing", where=str(path), hint=hint) from cause
    # ValueError: a name with a NUL
    except (OSError, ValueError) as cause:
        raise error(f"{path.name} cannot be read: {cause}", where=str(path), hint=hint) from cause
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{path.name} is not a plain file", where=str(path), hint=hint)
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, *, most_bytes: int, error: Fault, hint: str | None = None) -> bytes:
    """The bytes of a plain file of at most ``most_bytes``.

    Raises:
        error: as ``open_plain``, or the file is larger.
    """
    with open_plain(path, error, hint=hint) as file:
        try:
            content = file.read(most_bytes + 1)
        except OSError as cause:
            raise error(f"{path.name} cannot be read: {cause}", where=str(path), hint=hint) from cause
    if len(content) > most_bytes:
        raise error(f"{path.name} has more than {most_bytes:,} bytes", where=str(path), hint=hint)
    return content


def read_json(
    source: Path | bytes,
    *,
    most_bytes: int,
    error: Fault,
    what: str | None = None,
    hint: str | None = None,
    most_depth: int = MOST_DEPTH,
    most_values: int = MOST_VALUES,
) -> Any:
    """JSON of a stranger, without what parsers disagree about.

    Args:
        source: a plain file, or what was received.
        most_bytes: largest size.
        error: class of the errors.
        what: what the messages call it; None takes the name of the file.
        hint: the next command, for the messages.
        most_depth: levels of objects and lists.
        most_values: values and keys together, about.

    Raises:
        error: missing, not a plain file, too large, not UTF-8, not JSON, a key twice in an object, NaN or Infinity,
            a number of more than ``MOST_DIGITS`` digits, a lone surrogate, too deep, too many values.
    """
    where = str(source) if isinstance(source, Path) else None
    name = what or (source.name if isinstance(source, Path) else "the document")
    body = source if isinstance(source, bytes) else read_bytes(source, most_bytes=most_bytes, error=error, hint=hint)
    try:
        if len(body) > most_bytes:
            raise _Refused(f"has more than {most_bytes:,} bytes")
        _check_structure(body, most_depth, most_values)
        return _parsed(body)
    except _Refused as cause:
        raise error(f"{name} {cause}", where=where, hint=hint) from cause


def read_object(
    source: Path | bytes, *, most_bytes: int, error: Fault, what: str | None = None, hint: str | None = None
) -> dict[str, Any]:
    """As ``read_json``; anything but a JSON object is refused too."""
    found = read_json(source, most_bytes=most_bytes, error=error, what=what, hint=hint)
    if not isinstance(found, dict):
        where = str(source) if isinstance(source, Path) else None
        name = what or (source.name if isinstance(source, Path) else "the document")
        raise error(f"{name} is not an object", where=where, hint=hint)
    return found


def read_record(
    path: Path, kind: type[AnyRecord], *, most_bytes: int, error: Fault, hint: str | None = None
) -> AnyRecord:
    """A file that holds one of our records.

    Raises:
        error: as ``read_json``, or the first field that is wrong.
    """
    body = read_bytes(path, most_bytes=most_bytes, error=error, hint=hint)
    read_json(body, most_bytes=most_bytes, error=error, what=path.name, hint=hint)
    try:
        # of the bytes: a record read from JSON takes a list for a tuple and a string for a path
        return kind.model_validate_json(body)
    except ValidationError as cause:
        raise error(f"{path.name} is damaged: {first_fault(cause)}", where=str(path), hint=hint) from cause


def first_fault(cause: ValidationError) -> str:
    """The first field of a record that is wrong, and what is wrong with it."""
    first = cause.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def read_description(
    folder: Path, name: str, kind: type[AnyRecord], *, called: str, most_bytes: int, error: Fault, hint: str
) -> AnyRecord:
    """The file by which a folder says what it is.

    Args:
        called: what such a folder is, with its article.

    Raises:
        error: there is no folder, it is not one of ours, or the file is damaged.
    """
    if not folder.is_dir():
        raise error(f"there is no {called.rsplit(maxsplit=1)[-1]}", where=str(folder), hint=hint)
    if not os.path.lexists(folder / name):
        raise error(f"no {name}: not {called} of qwen-onnx", where=str(folder), hint=hint)
    return read_record(folder / name, kind, most_bytes=most_bytes, error=error, hint=hint)


def is_deeper(value: object, most: int) -> bool:
    """Whether a value nests more than ``most`` objects and lists; found without recursion, which would need a stack."""
    level = _nested([value])
    for _ in range(most):
        level = _nested(item for outer in level for item in (outer.values() if isinstance(outer, Mapping) else outer))
    return bool(level)


def _nested(items: Iterable[object]) -> list[Collection[object]]:
    return [item for item in items if isinstance(item, Collection) and not isinstance(item, str | bytes)]


class _Refused(ValueError):
    """Why a document is refused, to follow its name."""


def _check_structure(body: bytes, most_depth: int, most_values: int) -> None:
    """Count levels and values before a parser makes objects of them; up to the first error it sees the same strings."""
    bare = STRING.sub(b'""', body)
    if bare.count(b",") + bare.count(b":") + bare.count(b"[") + bare.count(b"{") > most_values:
        raise _Refused(f"holds more than {most_values:,} values")
    depth = 0
    for bracket in BRACKET.findall(bare):
        depth += 1 if bracket in b"[{" else -1
        if depth > most_depth:
            raise _Refused(f"is nested deeper than {most_depth} levels")


def _parsed(body: bytes) -> Any:
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_no_number,
        )
        if SURROGATE.search(body):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as cause:
        raise _Refused(f"is not UTF-8: byte {cause.start} is wrong") from cause
    except UnicodeEncodeError as cause:
        raise _Refused("holds half of a character (a lone surrogate)") from cause
    except json.JSONDecodeError as cause:
        raise _Refused(f"is not JSON: {cause.msg} at character {cause.pos}") from cause
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _Refused("has the same key twice in an object")
    return made


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise _Refused(f"holds a number of {len(text)} digits, the most is {MOST_DIGITS}")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _Refused("holds a number that is too large")
    return number


def _no_number(text: str) -> NoReturn:
    raise _Refused(f"is not JSON: {text} is not a number")
