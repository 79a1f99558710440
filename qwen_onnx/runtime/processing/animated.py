"""How many frames an animated picture has and how long they last, from its container alone: no pixel is decoded.

GIF, APNG and WebP are sequences of blocks with their lengths; a walk from block to block finds the frames. Pillow
counts those of a GIF by reading it to its end, and believes what an APNG declares.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from qwen_onnx.errors import RequestError

# formats, as Pillow calls them
ANIMATED = ("GIF", "PNG", "WEBP")
# what browsers show a frame for whose file does not say
USUAL_SECONDS = 0.1
PNG = b"\x89PNG\r\n\x1a\n"
EXTENSION, CONTROL, IMAGE, TRAILER = 0x21, 0xF9, 0x2C, 0x3B
INSTEAD = 'send its frames, {"type": "video", "video": [data URI, ...], "fps": number}, or a GIF, an APNG or a WebP'


def timing(content: bytes, most: int, *, where: str) -> tuple[int, float]:
    """Frames of an animated picture, and the seconds that all of them last.

    Args:
        most: frames; a file with more is not read to its end.

    Raises:
        RequestError: a video of another kind, no such file, one that is damaged or has more frames. Names ``where``.
    """
    walk = _walk_of(content)
    if walk is None:
        kind = _kind(content)
        told = f"videos in {kind} are not decoded here" if kind else "this is not a GIF, an APNG or a WebP"
        raise RequestError(f"{told}: {INSTEAD}", where=where)
    count, seconds = 0, 0.0
    try:
        for lasts in walk(content):
            count, seconds = count + 1, seconds + (lasts or USUAL_SECONDS)
            if count > most:
                raise RequestError(f"the video has more than {most} frames, the most", where=where, hint="send fewer")
    except (IndexError, struct.error) as error:
        raise RequestError("the video is damaged: it ends within a block", where=where, hint="save it again") from error
    return count, seconds


def _walk_of(content: bytes) -> Callable[[bytes], Iterator[float]] | None:
    if content[:6] in (b"GIF87a", b"GIF89a"):
        return _gif
    if content[:8] == PNG:
        return _apng
    return _webp if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


def _kind(content: bytes) -> str | None:
    """What is a video, by its first bytes."""
    if content[4:8] == b"ftyp":
        return "MP4"
    if content[:4] == b"\x1aE\xdf\xa3":
        return "WebM"
    if content[:4] == b"RIFF" and content[8:12] == b"AVI ":
        return "AVI"
    return "MPEG" if content[:4] in (b"\0\0\1\xba", b"\0\0\1\xb3") else None


def _gif(content: bytes) -> Iterator[float]:
    """Seconds of each image; a control block before it says them."""
    at, lasts = 13 + _table(content[10]), 0.0
    while at < len(content) and content[at] != TRAILER:
        kind = content[at]
        if kind == EXTENSION:
            if content[at + 1] == CONTROL:
                lasts = int.from_bytes(content[at + 4 : at + 6], "little") / 100
            at = _behind(content, at + 2)
        elif kind == IMAGE:
            yield lasts
            lasts = 0.0
            at = _behind(content, at + 11 + _table(content[at + 9]))
        else:
            # between blocks nothing may stand, and decoders pass over it
            at += 1


def _table(packed: int) -> int:
    """Bytes of a table of colours."""
    return 3 << (packed & 7) + 1 if packed & 0x80 else 0


def _behind(content: bytes, at: int) -> int:
    """Where the pieces of a block end, each of which begins with its length."""
    while content[at]:
        at += 1 + content[at]
    return at + 1


def _apng(content: bytes) -> Iterator[float]:
    at = len(PNG)
    while at + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, at)
        if kind == b"fcTL":
            lasts, of = struct.unpack_from(">HH", content, at + 28)
            yield lasts / (of or 100)
        at += 12 + size


def _webp(content: bytes) -> Iterator[float]:
    at = 12
    while at + 8 <= len(content):
        kind, size = struct.unpack_from("<4sI", content, at)
        if kind == b"ANMF":
            # of 16 bytes before the frame, three
            yield struct.unpack_from("<I", content, at + 20)[0] % (1 << 24) / 1000
        at += 8 + size + size % 2
