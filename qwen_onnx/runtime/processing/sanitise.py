"""Taking out of a text what a browser would run, for those who render answers as raw HTML.

Off by default: a coding assistant that is asked for a page with a script, or for a data: URL, would answer with holes.
Whoever shows answers as text, as the chat page here does, needs none of it; whoever renders HTML should use a real HTML
sanitiser (DOMPurify, nh3) and may have this as a second line. What is taken out leaves ``[removed]``: without it, what
stands left and right of a hole could join to the very pattern that was taken out.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from typing import Any

MARK = "[removed]"
ELEMENTS = ("script", "iframe")
SCHEMES = ("javascript:", "vbscript:")
BLANKS = str.maketrans("", "", "\t\r\n")
# RFC 2397; a type without a slash is text to browsers
_TYPE = r"[a-z0-9.+*-]+/[a-z0-9.+*-]+"
_PARAMETERS = r"(?:;[^,;\s\"'<>]*)*"
DATA = re.compile(rf"data:(?:{_TYPE})?{_PARAMETERS},")
DATA_BEGUN = re.compile(rf"data:(?:[a-z0-9.+*-]*|[a-z0-9.+*-]+/[a-z0-9.+*-]*|(?:{_TYPE})?{_PARAMETERS})")
ENDS_OF_URL = frozenset(" \t\r\n\"'<>)`")
# what is still undecided after so many characters counts as found
MOST_HELD = 256


class Sanitiser:
    """An incremental filter: however the text is cut, the pieces add up to the same.

    Removed: ``<script>`` and ``<iframe>`` elements with all they hold, ``javascript:`` and ``vbscript:``, and data:
    URLs; the schemes also with the line breaks inside that browsers ignore.
    """

    def __init__(self) -> None:
        self._held = ""
        self._inside: str | None = None
        self._out: list[str] = []

    def push(self, text: str) -> str:
        """The part of the text so far that is certain to be harmless."""
        for character in text:
            self._feed(character)
        return self._taken()

    def flush(self) -> str:
        """What was held back; an element that began and never ended is removed too."""
        while self._held and self._inside is None:
            held, self._held = self._held, ""
            if held[0] == "<" and held[1:].lower() in ELEMENTS:
                self._out.append(MARK)
                break
            # no pattern begins here: one may begin behind
            self._out.append(held[0])
            for character in held[1:]:
                self._feed(character)
        self._held, self._inside = "", None
        return self._taken()

    def _taken(self) -> str:
        text = "".join(self._out)
        self._out.clear()
        return text

    def _feed(self, character: str) -> None:
        # what turned out to be no pattern is looked at again from its second character: another may begin there
        again = deque(character)
        while again:
            character = again.popleft()
            if self._inside == "url" and character not in ENDS_OF_URL:
                continue
            if self._inside in ELEMENTS:
                self._skip(character)
                continue
            self._inside = None
            waiting, self._held = self._held + character, ""
            found = _judge(waiting)
            if found is True:
                self._held = waiting
            elif isinstance(found, str):
                self._out.append(MARK)
                self._inside = found or None
            else:
                self._out.append(waiting[0])
                again.extendleft(reversed(waiting[1:]))

    def _skip(self, character: str) -> None:
        """Inside an element: wait for its end tag, which may be written ``</script   >``."""
        tag = f"</{self._inside}"
        self._held += character
        begun = self._held.lower()
        if begun.startswith(tag):
            if character == ">":
                self._held, self._inside = "", None
            else:
                # only its beginning matters: an attribute of any length must not pile up
                self._held = self._held[: len(tag)]
        elif not tag.startswith(begun):
            self._held = "<" if character == "<" else ""


def _judge(text: str) -> bool | str:
    """False: no pattern begins here. True: it may become one. A string: it is one, and what is to be skipped now."""
    low = text.lower()
    if low[0] == "<":
        return _judge_tag(low)
    return _judge_url(low.translate(BLANKS), len(text)) if low[0] in "jvd" else False


def _judge_tag(low: str) -> bool | str:
    for name in ELEMENTS:
        if f"<{name}".startswith(low):
            return True
        if low[:-1] == f"<{name}" and (low[-1].isspace() or low[-1] in "/>"):
            return name
    return False


def _judge_url(low: str, length: int) -> bool | str:
    if low in SCHEMES:
        return ""
    if DATA.fullmatch(low):
        return "url"
    begun = any(scheme.startswith(low) for scheme in (*SCHEMES, "data:")) or DATA_BEGUN.fullmatch(low)
    return "url" if begun and length > MOST_HELD else bool(begun)


def sanitised(value: Any) -> Any:
    """A copy of a text, or of nested messages, with every string filtered."""
    if isinstance(value, str):
        sanitiser = Sanitiser()
        return sanitiser.push(value) + sanitiser.flush()
    if isinstance(value, Mapping):
        return {key: sanitised(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [sanitised(item) for item in value]
    return value
