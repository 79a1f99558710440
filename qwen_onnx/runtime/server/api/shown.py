"""Pictures, sounds and videos as requests have them: by a URL or in base64, in a part that has a place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.processing.data_uri import from_base64, picture_bytes, video_bytes
from qwen_onnx.runtime.server.fetching import Fetcher
from qwen_onnx.runtime.service.generation import Attached, AttachedVideo
from qwen_onnx.runtime.service.senses import MOST_PICTURES, MOST_SOUNDS, MOST_VIDEOS

T = TypeVar("T")
REMOTE = ("http:", "https:")


@dataclass(frozen=True)
class Shown:
    """A picture's URL, and where the request has it."""

    url: str
    where: str


@dataclass(frozen=True)
class Played:
    """A sound in base64, the format that the request says, and where the request has it."""

    data: str
    form: str
    where: str


@dataclass(frozen=True)
class Filmed:
    """A video's URL, or one of each frame, and where the request has it; ``fps``: see ``AttachedVideo``."""

    urls: str | Sequence[str]
    where: str
    fps: float | None = None


def attached(pictures: Sequence[Shown], fetcher: Fetcher | None) -> list[Attached]:
    """The bytes of pictures; long ones and those that are elsewhere take a while.

    Args:
        fetcher: None: remote URLs are refused.

    Raises:
        RequestError: a URL that is not fetched, a picture that is not there, or not base64; names the part.
        OverloadedError: others fetch already.
    """
    remote = [(one.where, one.url) for one in pictures if one.url[:8].lower().startswith(REMOTE)]
    fetched = fetcher.fetch(remote) if fetcher and remote else {}
    return [
        Attached(fetched[one.where] if one.where in fetched else picture_bytes(one.url, where=one.where), one.where)
        for one in pictures
    ]


def played(sounds: Sequence[Played]) -> list[Attached]:
    """The bytes of sounds; RequestError for what is not base64, naming the part."""
    return [Attached(from_base64(one.data, "sound", where=one.where), one.where, one.form) for one in sounds]


def filmed(videos: Sequence[Filmed]) -> list[AttachedVideo]:
    """The bytes of videos; RequestError for what is no data URI or not base64, naming the part, and the frame."""
    return [AttachedVideo(_content(one), one.where, one.fps) for one in videos]


def _content(video: Filmed) -> bytes | tuple[bytes, ...]:
    if isinstance(video.urls, str):
        return video_bytes(video.urls, where=video.where)
    return tuple(picture_bytes(url, where=f"{video.where}.{index}") for index, url in enumerate(video.urls))


def bounded(pictures: Iterable[Shown], field: str) -> list[Shown]:
    """All pictures of a request.

    Raises:
        RequestError: more than ``MOST_PICTURES``; names ``field``, which has them.
    """
    return _at_most(MOST_PICTURES, list(pictures), "pictures", field)


def bounded_sounds(sounds: Iterable[Played], field: str) -> list[Played]:
    """All sounds of a request; RequestError like ``bounded``."""
    return _at_most(MOST_SOUNDS, list(sounds), "sounds", field)


def bounded_videos(videos: Iterable[Filmed], field: str) -> list[Filmed]:
    """All videos of a request; RequestError like ``bounded``."""
    return _at_most(MOST_VIDEOS, list(videos), "videos", field)


def _at_most(most: int, found: list[T], kind: str, field: str) -> list[T]:
    if len(found) > most:
        raise RequestError(f"{len(found)} {kind}, the most are {most}", where=field, hint="send fewer")
    return found
