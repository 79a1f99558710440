"""Pictures and sounds in the text of a request: data URIs (RFC 2397) and base64. Nothing is fetched here."""

from __future__ import annotations

import base64
import binascii
import re

from qwen_onnx.errors import RequestError

# of the file of a picture or a sound
MOST_BYTES = 20 << 20
HEAD = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE)
INSTEAD = "send the picture itself, data:image/png;base64,..."


def picture_bytes(url: str, *, where: str) -> bytes:
    """What a data URI of a picture holds; its media type is not believed, the bytes are looked at later.

    Raises:
        RequestError: another kind of URL, or not base64. Names ``where``.
    """
    head = HEAD.match(url)
    if head is None:
        if url[:8].lower().startswith(("http:", "https:", "ftp:", "file:")):
            raise RequestError(f"remote URLs are not fetched: {INSTEAD}", where=where)
        raise RequestError("this is not a data URI of a picture in base64", where=where)
    return from_base64(url[head.end() :], "picture", where=where)


def from_base64(text: str, kind: str, *, where: str) -> bytes:
    """The bytes of a ``kind``; RequestError when it is not base64, naming ``where``."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"the {kind} is not base64: {error}", where=where) from error
