"""Pictures as requests show them: each by a URL, in a part that has a place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.processing.data_uri import picture_bytes
from qwen_onnx.runtime.server.fetching import Fetcher
from qwen_onnx.runtime.service.generation import Attached
from qwen_onnx.runtime.service.senses import MOST_PICTURES

REMOTE = ("http:", "https:")


@dataclass(frozen=True)
class Shown:
    """A picture's URL, and where the request has it."""

    url: str
    where: str


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


def bounded(pictures: Iterable[Shown], field: str) -> list[Shown]:
    """All pictures of a request.

    Raises:
        RequestError: more than ``MOST_PICTURES``; names ``field``, which has them.
    """
    found = list(pictures)
    if len(found) > MOST_PICTURES:
        raise RequestError(f"{len(found)} pictures, the most are {MOST_PICTURES}", where=field, hint="send fewer")
    return found
