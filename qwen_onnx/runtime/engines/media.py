"""Pictures and sounds in a request, ready for the encoder, and where their tokens stand.

A model takes one of the two: pictures on three axes of positions, or sounds, whose tokens follow each other as text's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_onnx.errors import RequestError

Positions = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture as the encoder takes it, or as many frames of a video as make one patch in time.

    Attributes:
        pixels: float32 [patches, channels · temporal_patch_size · patch_size²].
        grid: patches in time (always one), down and across.
        merge: patches of a side that become one token.
        digest: SHA-256 of pixels and grid: equal pictures have equal ones.
        joined: its tokens follow those of the picture before it without a gap, and count their positions from where
            that one does: both are of one video.
        moment: how far it stands in time behind the first picture of its video, in positions.
    """

    pixels: np.ndarray[Any, np.dtype[np.float32]]
    grid: tuple[int, int, int]
    merge: int
    digest: str
    joined: bool = False
    moment: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens of a prompt it takes."""
        return self.grid[0] * self.grid[1] * self.grid[2] // self.merge**2


@dataclass(frozen=True, eq=False)
class Sound:
    """A sound as the encoder takes it.

    Attributes:
        mel: float32 [bands, frames], its log-mel spectrogram, and of the silence behind it what convolutions see.
        frames: that are of the sound itself.
        tokens: how many tokens of a prompt it takes.
        digest: SHA-256 of spectrogram and frames: equal sounds have equal ones.
    """

    mel: np.ndarray[Any, np.dtype[np.float32]]
    frames: int
    tokens: int
    digest: str


Medium = Picture | Sound


def called(media: Sequence[Medium]) -> str:
    """What they are, for messages."""
    return "sound" if media and isinstance(media[0], Sound) else "picture"


def places_of(prompt: Sequence[int], media: Sequence[Medium], token: int | None) -> list[int]:
    """Where each medium's tokens begin in a prompt that holds one ``token`` for every token of one.

    Raises:
        RequestError: the model reads text alone, or the prompt has room for other media than these.
    """
    kind = called(media)
    if token is None:
        if media:
            raise RequestError(f"this model takes no {kind}s", where="messages", hint="serve one that does")
        return []
    begins: list[int] = []
    at = 0
    for medium in media:
        begin = next((index for index in range(at, len(prompt)) if prompt[index] == token), None)
        apart = isinstance(medium, Picture) and medium.joined and (not begins or begin != at)
        at = len(prompt) if begin is None else begin + medium.tokens
        if begin is None or apart or at > len(prompt) or any(each != token for each in prompt[begin:at]):
            raise RequestError(f"the prompt has no room for {kind} {len(begins) + 1} of {len(media)}", where="messages")
        begins.append(begin)
    if token in prompt[at:]:
        raise RequestError(f"the prompt has room for more than {len(media)} {kind}s", where="messages")
    return begins


def positions_of(length: int, pictures: Sequence[Picture], begins: Sequence[int]) -> tuple[Positions, int]:
    """Positions in time, down and across of every token of a prompt, as transformers 5 counts them.

    Behind a video text goes on behind the longer side of a frame, as behind a picture, also where its last moment is
    later. Before transformers 5, and in vLLM, text goes on behind that. What is generated stands where it would stand
    in a prompt, so that a prompt and its answer are read alike in the next turn; ``generate`` of transformers counts
    it from the largest position of the prompt.

    Args:
        length: tokens of the prompt; begins: see ``places_of``.

    Returns:
        int64 [3, length]; and how much a token behind the prompt is moved against its place.
    """
    found = np.zeros((3, length), np.int64)
    at, start, next_position = 0, 0, 0
    for picture, begin in zip(pictures, begins, strict=True):
        if not picture.joined:
            found[:, at:begin] = np.arange(next_position, next_position + begin - at)
            start = next_position + begin - at
        down, across = picture.grid[1] // picture.merge, picture.grid[2] // picture.merge
        at = begin + picture.tokens
        found[0, begin:at] = start + picture.moment
        found[1, begin:at] = start + np.repeat(np.arange(down), across)
        found[2, begin:at] = start + np.tile(np.arange(across), down)
        # text goes on behind the longer side
        next_position = start + max(down, across)
    found[:, at:] = np.arange(next_position, next_position + length - at)
    return found, next_position + length - at - length


def keys_of(prompt: Sequence[int], media: Sequence[Medium], begins: Sequence[int]) -> list[int]:
    """The prompt with a number of its own for each medium: beginnings are equal when their media are, too."""
    keys = list(prompt)
    for medium, begin in zip(media, begins, strict=True):
        # below every token id
        keys[begin : begin + medium.tokens] = [-1 - _number(medium)] * medium.tokens
    return keys


def _number(medium: Medium) -> int:
    """Equal where keys and values are, which depend on positions, too."""
    number = int(medium.digest[:30], 16)
    if isinstance(medium, Picture):
        return (number << 33) | (medium.moment << 1) | medium.joined
    return number << 33
