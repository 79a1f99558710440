"""Bodies of ``multipart/form-data`` (RFC 7578), whole and bounded: the gate has counted their bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen_onnx.errors import RequestError

MOST_PARTS, MOST_HEAD = 32, 4096
FORM = re.compile(r"multipart/form-data\s*(;.*)?", re.IGNORECASE)
BOUNDARY = re.compile(r";\s*boundary=(?:\"([^\"]{1,70})\"|([^\s;\"]{1,70}))", re.IGNORECASE)
PARAMETER = re.compile(r";\s*([A-Za-z*]+)=(?:\"((?:[^\"\\]|\\.)*)\"|([^\s;\"]*))")
# encodings of a part that change nothing
PLAIN = ("", "7bit", "8bit", "binary")
LINE, BLANK, DASHES = b"\r\n", b"\r\n\r\n", b"--"


@dataclass(frozen=True)
class Part:
    """A field of a form; ``is_file``: it came with the name of a file, which nobody reads."""

    name: str
    content: bytes
    is_file: bool

    @property
    def text(self) -> str:
        """RequestError for what is not UTF-8."""
        try:
            return self.content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"{self.name} is not UTF-8", where=self.name) from error


def read_form(content: bytes, content_type: str) -> dict[str, Part]:
    """The fields of a form by their names.

    Raises:
        RequestError: another type of body, a form that is damaged or cut off, too many fields, two of one name.
    """
    kind = FORM.fullmatch(content_type.strip())
    if kind is None:
        raise RequestError(f"the body is {content_type[:60] or 'of no type'}, not multipart/form-data", where="file")
    told = BOUNDARY.search(kind[1] or "")
    if told is None:
        raise RequestError("multipart/form-data without a boundary of 1 to 70 characters", where="file")
    found: dict[str, Part] = {}
    for part in _parts(content, DASHES + (told[1] or told[2]).encode("latin-1", "replace")):
        if part.name in found:
            raise RequestError(f"there are two fields {part.name[:60]!r}", where=part.name)
        found[part.name] = part
    return found


def _parts(content: bytes, mark: bytes) -> list[Part]:
    found: list[Part] = []
    if not content.startswith(mark):
        raise _damaged("it does not begin with its boundary")
    at = len(mark)
    while content[at : at + 2] != DASHES:
        if len(found) == MOST_PARTS:
            raise RequestError(f"the form has more than {MOST_PARTS} fields", where="file")
        if content[at : at + 2] != LINE:
            raise _damaged("something follows a boundary")
        head_end = content.find(BLANK, at, at + MOST_HEAD)
        if head_end < 0:
            raise _damaged(f"a field has no end of its headers within {MOST_HEAD} bytes")
        begin = head_end + len(BLANK)
        end = content.find(LINE + mark, begin)
        if end < 0:
            raise _damaged("it ends before its last boundary")
        found.append(_part(content[at + 2 : head_end], content[begin:end]))
        at = end + len(LINE) + len(mark)
    return found


def _part(head: bytes, content: bytes) -> Part:
    try:
        lines = head.decode("utf-8").split("\r\n")
    except UnicodeDecodeError as error:
        raise _damaged("the headers of a field are not UTF-8") from error
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("content-transfer-encoding", "").lower() not in PLAIN:
        raise _damaged("a field has a transfer encoding")
    disposition = headers.get("content-disposition", "")
    told = {name.lower(): quoted or plain for name, quoted, plain in PARAMETER.findall(disposition)}
    if not disposition.lower().startswith("form-data") or not told.get("name"):
        raise _damaged("a field has no name")
    return Part(told["name"], content, "filename" in told or "filename*" in told)


def _damaged(why: str) -> RequestError:
    return RequestError(f"the form is damaged: {why}", where="file")
