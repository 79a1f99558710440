"""Pictures as the vision encoder takes them, in NumPy and Pillow: decoded, resized, normalised, cut into patches.

What is computed is what transformers' slow processor of Qwen2-VL computes (``Qwen2VLImageProcessorPil``). A picture
comes from strangers: its format is looked up in a short list, its declared size is known before a pixel is decoded.
"""

from __future__ import annotations

import hashlib
import io
import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from qwen_onnx.artifact.processor_config import ImageSettings, Three
from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.engines.media import Picture
from qwen_onnx.runtime.processing.data_uri import MOST_BYTES

# raster formats whose decoders are widely used; SVG is a program, TIFF and the like have decoders of many kinds
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# of the longer side to the shorter, as in transformers
MOST_RATIO = 200
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = {TURNS[number] for number in (5, 6, 7, 8)}
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")


@dataclass(frozen=True)
class ImageLimits:
    """What one picture may cost. ``most_pixels`` are those that the file declares."""

    most_bytes: int = MOST_BYTES
    most_pixels: int = 40_000_000


def decode_image(content: bytes, *, where: str, limits: ImageLimits = ImageLimits()) -> Image.Image:
    """The picture in ``content`` as RGB, upright; the first frame of an animated one.

    An alpha channel is dropped, as transformers drops it; 16 bits of grey become the upper eight.

    Raises:
        RequestError: too many bytes or declared pixels, no format that is read here, or damaged. Names ``where``.
    """
    with opened_image(content, where, limits) as image:
        image.load()
        return rgb(_upright(image))


def upright_size(content: bytes, *, where: str, limits: ImageLimits = ImageLimits()) -> tuple[int, int]:
    """Width and height that ``decode_image`` would give, of which no pixel is decoded. Raises like it."""
    with opened_image(content, where, limits) as image:
        width, height = image.size
        return (height, width) if _turn(image) in SIDEWAYS else (width, height)


@contextmanager
def opened_image(
    content: bytes, where: str, limits: ImageLimits, formats: tuple[str, ...] = FORMATS
) -> Iterator[Image.Image]:
    """The picture in ``content``, of which no pixel is decoded yet; what fails then is told as by ``decode_image``."""
    if len(content) > limits.most_bytes:
        raise RequestError(f"the picture has {len(content):,} bytes, the most is {limits.most_bytes:,}", where=where)
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            width, height = image.size
            if width * height > limits.most_pixels:
                raise _too_large(f"{width} × {height} pixels", limits, where)
            yield image
    except Image.DecompressionBombError as error:
        raise _too_large("far more pixels", limits, where) from error
    except UnidentifiedImageError as error:
        known = ", ".join(formats)
        raise RequestError(f"this is not a picture of a known format: {known}", where=where) from error
    # PNG's decoder raises SyntaxError for a damaged chunk, struct.error for one that is too short
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, TypeError, MemoryError) as error:
        raise RequestError(f"the picture is damaged: {error}", where=where, hint="save it again") from error


def _too_large(size: str, limits: ImageLimits, where: str) -> RequestError:
    return RequestError(
        f"the picture declares {size}, the most are {limits.most_pixels:,}", where=where, hint="send a smaller one"
    )


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What its EXIF asks for; EXIF that cannot be read asks for nothing."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return None


def _upright(image: Image.Image) -> Image.Image:
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def rgb(image: Image.Image) -> Image.Image:
    """Without an alpha channel; of 16 bits of grey the upper eight."""
    if image.mode in SIXTEEN_BITS:
        # Pillow would cut off at 255 and show a white picture
        upper = np.clip(np.asarray(image, np.int64) >> 8, 0, 255).astype(np.uint8)
        image = Image.fromarray(upper)
    return image.convert("RGB")


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width that ``factor`` divides, near the ratio, within the bounds; as in transformers.

    Raises:
        ValueError: one side is more than ``MOST_RATIO`` times the other.
    """
    if max(height, width) > MOST_RATIO * min(height, width):
        raise ValueError(f"one side is more than {MOST_RATIO} times the other: {width} × {height}")
    # Python's round: halves go to the even number, in transformers too
    down, across = round(height / factor) * factor, round(width / factor) * factor
    if down * across > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        down = max(factor, math.floor(height / shrink / factor) * factor)
        across = max(factor, math.floor(width / shrink / factor) * factor)
    elif down * across < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        down = math.ceil(height * grow / factor) * factor
        across = math.ceil(width * grow / factor) * factor
    return down, across


def _size(image: Image.Image, settings: ImageSettings, where: str) -> tuple[int, int]:
    """Height and width that the encoder sees."""
    factor = settings.patch_size * settings.merge_size
    try:
        return smart_resize(image.height, image.width, factor, settings.min_pixels, settings.max_pixels)
    except ValueError as error:
        raise RequestError(f"the picture cannot be used: {error}", where=where, hint="cut it") from error


def tokens_of(image: Image.Image, settings: ImageSettings, *, where: str) -> int:
    """How many tokens a picture takes, known before it is resized.

    Raises:
        RequestError: its sides are too unequal.
    """
    height, width = _size(image, settings, where)
    return height * width // (settings.patch_size * settings.merge_size) ** 2


def prepare(image: Image.Image, settings: ImageSettings, *, where: str) -> Picture:
    """An RGB picture as the encoder takes it.

    Raises:
        RequestError: its sides are too unequal.
    """
    height, width = _size(image, settings, where)
    return patches_of([resized(image, height, width)], settings, settings.mean, settings.std)


def resized(image: Image.Image, height: int, width: int) -> Image.Image:
    """The kernel of transformers' slow processor."""
    if (height, width) == (image.height, image.width):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


def patches_of(
    frames: Sequence[Image.Image],
    settings: ImageSettings,
    mean: Three,
    std: Three,
    *,
    joined: bool = False,
    moment: int = 0,
) -> Picture:
    """Of one frame or of several of one size that patches divide, the last of which fills up the patches in time.

    Args:
        joined, moment: see ``Picture``.
    """
    patch, merge = settings.patch_size, settings.merge_size
    values = np.stack([np.asarray(frame, np.float32) for frame in frames]) * np.float32(1 / 255)
    values -= np.asarray(mean, np.float32)
    values /= np.asarray(std, np.float32)
    count, height, width, _ = values.shape
    down, across = height // patch, width // patch
    cut = values.transpose(0, 3, 1, 2).reshape(count, 3, down // merge, merge, patch, across // merge, merge, patch)
    # windows of merge × merge patches one after the other: each becomes one token
    ordered = cut.transpose(2, 5, 3, 6, 1, 0, 4, 7)
    last = np.repeat(ordered[..., -1:, :, :], settings.temporal_patch_size - count, axis=5)
    pixels = np.concatenate([ordered, last], axis=5).reshape(down * across, -1)
    digest = hashlib.sha256(repr((down, across)).encode() + pixels.tobytes()).hexdigest()
    return Picture(pixels, (1, down, across), merge, digest, joined, moment)
