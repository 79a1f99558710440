"""Videos of a conversation: what stands for them in a rendered prompt, and what becomes of each place."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from qwen_onnx.artifact.processor_config import ImageSettings
from qwen_onnx.artifact.video_config import VideoSettings
from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.engines.media import Medium, Picture

if TYPE_CHECKING:
    from qwen_onnx.runtime.processing.clips import Clip

Media = tuple[Medium, ...]


@dataclass(frozen=True)
class Place:
    """What one token of a rendered prompt stands for.

    Attributes:
        open: gives how many tokens it takes, known before all work is done, and what does the rest.
    """

    where: str
    open: Callable[[], tuple[int, Callable[[], Media]]]


def require_places(ids: Sequence[int], token: int, sent: int, kinds: str) -> None:
    """RequestError unless a rendered prompt has one ``token`` for each of the ``kinds`` that were sent."""
    places = sum(each == token for each in ids)
    if places != sent:
        raise _other_places(places, sent, kinds)


def _other_places(places: int, sent: int, kinds: str) -> RequestError:
    return RequestError(f"the chat template has places for {places} {kinds}, {sent} were sent", where="messages")


class Films:
    """How a model that sees takes videos.

    Args:
        token, start: that stand for a part of a video, and before it.
        videos, images: how their frames become patches.
    """

    def __init__(self, token: int, start: int, videos: VideoSettings, images: ImageSettings) -> None:
        self.token, self._start, self._videos, self._images = token, start, videos, images

    def announced(self, rendered: str, clips: Sequence[Clip], special: Mapping[str, int]) -> str:
        """See ``Eyes``: a Qwen3-VL reads before each patch in time when it was taken.

        The markers of the template stand around each of these then, as in Qwen's own preparation; transformers 5 leaves
        a pair of them around the whole video, too.
        """
        if self._videos.time != "timestamps":
            return rendered
        texts: dict[int | None, str] = {token: text for text, token in special.items()}
        start, token, end = (texts.get(one) for one in (self._start, self.token, self._videos.vision_end_token_id))
        if start is None or token is None or end is None:
            raise RequestError("the tokenizer lacks the special tokens of videos", where=clips[0].where)
        parts = re.split(f"(?:{re.escape(start)})?{re.escape(token)}(?:{re.escape(end)})?", rendered)
        if len(parts) != len(clips) + 1:
            raise _other_places(len(parts) - 1, len(clips), "videos")
        group = self._images.temporal_patch_size
        timed = [[f"<{seconds:.1f} seconds>{start}{token}{end}" for seconds in clip.seconds(group)] for clip in clips]
        return parts[0] + "".join("".join(times) + part for times, part in zip(timed, parts[1:], strict=True))

    def places(self, ids: Sequence[int], clips: Sequence[Clip]) -> list[Place]:
        """Of every token that stands for a video, or for a patch in time of one.

        Raises:
            RequestError: other videos than the prompt has places for.
        """
        apart, found = self._videos.time == "timestamps", list[Place]()
        for clip in clips:
            left: list[Picture] = []
            found.append(Place(clip.where, partial(self._opened, clip, left if apart else None)))
            rest = clip.groups(self._images.temporal_patch_size) - 1 if apart else 0
            # their tokens are counted with the first
            found += [Place(clip.where, partial(_next, left))] * rest
        require_places(ids, self.token, len(found), "videos")
        return found

    def _opened(self, clip: Clip, left: list[Picture] | None) -> tuple[int, Callable[[], Media]]:
        """See ``Place``; ``left`` gets all pictures but the first, None: they have one place together."""
        from qwen_onnx.runtime.processing.clips import prepare_clip, tokens_of_clip

        def prepare() -> Media:
            pictures = prepare_clip(clip, self._images, self._videos)
            if left is None:
                return pictures
            left.extend(pictures[1:])
            return pictures[:1]

        return tokens_of_clip(clip, self._images, self._videos), prepare


def _next(left: list[Picture]) -> tuple[int, Callable[[], Media]]:
    return 0, lambda: (left.pop(0),)
