"""Videos as the vision encoder takes them: frames that a client sends, or those of an animated picture, all of them.

What is computed is what transformers' video processors of Qwen2-VL and Qwen3-VL compute of frames that were sampled
already, resized by Pillow as pictures are. A frame is a picture of a stranger: see ``images``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from qwen_onnx.artifact.processor_config import ImageSettings
from qwen_onnx.artifact.video_config import VideoSettings
from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.engines.media import Picture
from qwen_onnx.runtime.processing.animated import ANIMATED, timing
from qwen_onnx.runtime.processing.images import (
    MOST_RATIO,
    ImageLimits,
    decode_image,
    opened_image,
    patches_of,
    resized,
    rgb,
    smart_resize,
    upright_size,
)

FEWEST_FRAMES = 2
# frames a second: of a list that does not say it, as in Qwen's tools; and what may be said
USUAL_FPS, LEAST_FPS, MOST_FPS = 2.0, 0.001, 1000.0

FRAME_LIMITS = ImageLimits(most_pixels=4096 * 2160)


@dataclass(frozen=True)
class ClipLimits:
    """What one video may cost.

    Attributes:
        most_frames: as many as transformers' processors take of one.
        frame: each of its frames, or the animated file; of 4,096 × 2,160 pixels.
        most_pixels: of all frames together, as their files declare them.
    """

    most_frames: int = 768
    frame: ImageLimits = FRAME_LIMITS
    most_pixels: int = 400_000_000


@dataclass(frozen=True)
class Clip:
    """A video that was looked at and not decoded.

    Attributes:
        count: of its frames; height, width: of each; fps: frames a second.
        frames: decodes one after the other, RGB; RequestError for one that is damaged.
    """

    count: int
    height: int
    width: int
    fps: float
    frames: Callable[[], Iterator[Image.Image]]
    where: str

    def groups(self, size: int) -> int:
        """How many patches in time it makes, of ``size`` frames each."""
        return -(-self.count // size)

    def seconds(self, size: int) -> list[float]:
        """When each patch in time was taken: in the middle between its first and its last frame."""
        places = [min(index, self.count - 1) for index in range(self.groups(size) * size)]
        return [(places[at] / self.fps + places[at + size - 1] / self.fps) / 2 for at in range(0, len(places), size)]


def open_clip(
    content: bytes | Sequence[bytes], fps: float | None, *, where: str, limits: ClipLimits = ClipLimits()
) -> Clip:
    """The video in ``content``: an animated picture, or a picture for each frame. No pixel is decoded.

    Args:
        fps: frames a second of a list; a file says it itself, in the mean of its frames.

    Raises:
        RequestError: not such files, too few or too many frames or pixels, frames of different sizes, an ``fps`` that
            cannot be. Names ``where``, and the frame.
    """
    if isinstance(content, bytes):
        if fps is not None:
            raise RequestError("a file says its frames a second itself", where=where, hint="leave fps out")
        return _animated(content, where, limits)
    fps = USUAL_FPS if fps is None else fps
    if not LEAST_FPS <= fps <= MOST_FPS:
        raise RequestError(f"fps is {fps}, not from {LEAST_FPS} to {MOST_FPS:g}", where=where)
    _check_count(len(content), where, limits)
    sizes = []
    for index, frame in enumerate(content):
        sizes.append(upright_size(frame, where=f"{where}.{index}", limits=limits.frame))
        if sizes[-1] != sizes[0]:
            told = " × ".join(map(str, sizes[-1])), " × ".join(map(str, sizes[0]))
            raise RequestError(f"this frame is {told[0]}, the first is {told[1]}", where=f"{where}.{index}")
    width, height = sizes[0]
    _check_pixels(len(sizes), width, height, where, limits)

    def frames() -> Iterator[Image.Image]:
        for index, frame in enumerate(content):
            yield decode_image(frame, where=f"{where}.{index}", limits=limits.frame)

    return Clip(len(sizes), height, width, fps, frames, where)


def _animated(content: bytes, where: str, limits: ClipLimits) -> Clip:
    if len(content) > limits.frame.most_bytes:
        raise RequestError(
            f"the video has {len(content):,} bytes, the most is {limits.frame.most_bytes:,}", where=where
        )
    count, seconds = timing(content, limits.most_frames, where=where)
    _check_count(count, where, limits)
    fps = count / seconds
    if not LEAST_FPS <= fps <= MOST_FPS:
        raise RequestError(f"the video has {fps:.4g} frames a second, not {LEAST_FPS} to {MOST_FPS:g}", where=where)
    with opened_image(content, where, limits.frame, ANIMATED) as image:
        width, height = image.size
        # Pillow would read a GIF to its end for that
        first = int(getattr(image, "default_image", False))
        declared = count if image.format == "GIF" else getattr(image, "n_frames", 1) - first
        if declared != count:
            raise RequestError(f"the video is damaged: it declares {declared:,} frames and has {count}", where=where)
    _check_pixels(count, width, height, where, limits)

    def frames() -> Iterator[Image.Image]:
        with opened_image(content, where, limits.frame, ANIMATED) as image:
            for index in range(first, first + count):
                image.seek(index)
                yield rgb(image)

    return Clip(count, height, width, fps, frames, where)


def _check_count(count: int, where: str, limits: ClipLimits) -> None:
    if count < FEWEST_FRAMES:
        told = "one frame: send it as a picture" if count else "no frames"
        raise RequestError(f"the video has {told}; the fewest are {FEWEST_FRAMES}", where=where)
    if count > limits.most_frames:
        raise RequestError(f"{count} frames, the most are {limits.most_frames}", where=where, hint="send fewer")


def _check_pixels(count: int, width: int, height: int, where: str, limits: ClipLimits) -> None:
    if count * width * height > limits.most_pixels:
        told = f"the video declares {count} × {width} × {height} pixels, the most are {limits.most_pixels:,}"
        raise RequestError(told, where=where, hint="send fewer or smaller frames")


def frame_size(clip: Clip, images: ImageSettings, videos: VideoSettings) -> tuple[int, int]:
    """Height and width that the encoder sees of each frame.

    Raises:
        RequestError: its sides are too unequal.
    """
    factor = images.patch_size * images.merge_size
    resize = _size_of_all if videos.time == "timestamps" else _size_of_one
    try:
        return resize(clip, factor, images.temporal_patch_size, videos)
    except ValueError as error:
        raise RequestError(f"the video cannot be used: {error}", where=clip.where, hint="cut its frames") from error


def _size_of_one(clip: Clip, factor: int, group: int, videos: VideoSettings) -> tuple[int, int]:
    """Each frame within the bounds, as Qwen2-VL's processor has it."""
    most = videos.max_pixels
    if videos.most_tokens is not None:
        share = int(videos.most_tokens * factor**2 * 0.9) * group // clip.count
        most = max(min(most, share), int(videos.min_pixels * 1.05))
    return smart_resize(clip.height, clip.width, factor, videos.min_pixels, most)


def _size_of_all(clip: Clip, factor: int, group: int, videos: VideoSettings) -> tuple[int, int]:
    """All frames together within the bounds, as Qwen3-VL's processor has it."""
    height, width, count, most = clip.height, clip.width, clip.count, videos.max_pixels
    if videos.most_tokens is not None:
        share = min(videos.most_tokens * factor**2, most // count)
        most = max(share, int(videos.min_pixels * 1.05)) * count
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > MOST_RATIO * min(height, width):
        raise ValueError(f"one side is more than {MOST_RATIO} times the other: {clip.width} × {clip.height}")
    down, across = round(height / factor) * factor, round(width / factor) * factor
    pixels = round(count / group) * group * down * across
    if pixels > most:
        shrink = math.sqrt(count * height * width / most)
        down = max(factor, math.floor(height / shrink / factor) * factor)
        across = max(factor, math.floor(width / shrink / factor) * factor)
    elif pixels < videos.min_pixels:
        grow = math.sqrt(videos.min_pixels / (count * height * width))
        down = math.ceil(height * grow / factor) * factor
        across = math.ceil(width * grow / factor) * factor
    return down, across


def tokens_of_clip(clip: Clip, images: ImageSettings, videos: VideoSettings) -> int:
    """How many tokens its frames take, known before one is decoded. Raises like ``frame_size``."""
    height, width = frame_size(clip, images, videos)
    return clip.groups(images.temporal_patch_size) * (height * width // (images.patch_size * images.merge_size) ** 2)


def moments(clip: Clip, group: int, videos: VideoSettings) -> list[int]:
    """Where each patch in time stands behind the first, in positions; as transformers rounds it, in float32."""
    counted = np.arange(clip.groups(group), dtype=np.float32)
    if videos.time == "seconds":
        counted *= np.float32(videos.tokens_per_second or 0) * np.float32(group / clip.fps)
    found: list[int] = counted.astype(np.int64).tolist()
    return found


def prepare_clip(clip: Clip, images: ImageSettings, videos: VideoSettings) -> tuple[Picture, ...]:
    """A picture for each patch in time; frames are decoded one by one, and the last one fills up the last patch.

    Raises:
        RequestError: a frame is damaged.
    """
    group, (height, width) = images.temporal_patch_size, frame_size(clip, images, videos)
    apart, found, frames = videos.time == "timestamps", list[Picture](), list[Image.Image]()
    for index, frame in enumerate(clip.frames(), 1):
        frames.append(resized(frame, height, width))
        if len(frames) == group or index == clip.count:
            moment = 0 if apart else moments(clip, group, videos)[len(found)]
            joined = bool(found) and not apart
            found.append(patches_of(frames, images, videos.mean, videos.std, joined=joined, moment=moment))
            frames.clear()
    return tuple(found)
