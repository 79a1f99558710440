"""Pictures and sounds in the text of a request: data URIs (RFC 2397) and base64. Nothing is fetched here."""

from __future__ import annotations

import base64
import binascii
import re

from qwen_onnx.errors import RequestError

# of the file of a picture or a sound
MOST_BYTES = 20 << 20
HEAD = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE)
# an animated picture may call itself a picture
VIDEO_HEAD = re.compile(r"data:(?:image|video)/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE)
INSTEAD = "send the picture itself, data:image/png;base64,..."


def picture_bytes(url: str, *, where: str) -> bytes:
    """What a data URI of a picture holds; its media type is not believed, the bytes are looked at later.

    Raises:
        RequestError: another kind of URL, or not base64. Names ``where``.
    """
    return _bytes(url, HEAD, "picture", INSTEAD, where)


def video_bytes(url: str, *, where: str) -> bytes:
    """What a data URI of a video or an animated picture holds. Raises like ``picture_bytes``."""
    return _bytes(url, VIDEO_HEAD, "video", "send the video itself, data:image/gif;base64,...", where)


def _bytes(url: str, head: re.Pattern[str], kind: str, instead: str, where: str) -> bytes:
    found = head.match(url)
    if found is None:
        if url[:8].lower().startswith(("http:", "https:", "ftp:", "file:")):
            raise RequestError(f"remote URLs are not fetched: {instead}", where=where)
        raise RequestError(f"this is not a data URI of a {kind} in base64", where=where)
    return from_base64(url[found.end() :], kind, where=where)


def from_base64(text: str, kind: str, *, where: str) -> bytes:
    """The bytes of a ``kind``; RequestError when it is not base64, naming ``where``."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"the {kind} is not base64: {error}", where=where) from error
