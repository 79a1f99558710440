"""Videos: parity with transformers' processors, and what is refused before a frame is decoded."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_onnx.artifact.video_config import VIDEO_CONFIG, VideoSettings
from qwen_onnx.errors import ArtifactError, RequestError
from qwen_onnx.runtime.processing.clips import (
    Clip,
    ClipLimits,
    frame_size,
    moments,
    open_clip,
    prepare_clip,
    tokens_of_clip,
)
from qwen_onnx.runtime.processing.images import ImageLimits
from tests.conftest import rewrite_json
from tests.fixtures.clips import clip_file, frames
from tests.fixtures.pictures import SETTINGS, as_file, chart, declared, noise

OLDER = VideoSettings(
    time="seconds",
    min_pixels=56 * 56,
    max_pixels=28 * 28 * 64,
    tokens_per_second=2,
    mean=SETTINGS.mean,
    std=SETTINGS.std,
)
NEWER = VideoSettings(
    time="timestamps", min_pixels=8192, max_pixels=98_304, vision_end_token_id=3, mean=(0.5,) * 3, std=(0.5,) * 3
)
# Qwen3-VL's patches
LARGER = replace(SETTINGS, patch_size=16)
SIZES = [(56, 84, 4), (90, 120, 4), (217, 331, 5), (30, 30, 2), (200, 64, 3), (360, 640, 9), (20, 100, 8), (17, 40, 7)]


def clip_of(images: list[Image.Image], fps: float | None = None) -> Clip:
    return open_clip(tuple(map(as_file, images)), fps, where="it")


def stub(height: int, width: int, count: int, fps: float = 2.0) -> Clip:
    """One whose frames nobody decodes."""
    return Clip(count, height, width, fps, lambda: iter(()), "it")


@pytest.mark.parametrize(("height", "width", "count"), SIZES)
def test_sizes_are_those_of_transformers(height: int, width: int, count: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as of_one
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as of_all

    clip = stub(height, width, count)
    assert frame_size(clip, SETTINGS, OLDER) == of_one(height, width, 28, OLDER.min_pixels, OLDER.max_pixels)
    wanted = of_all(count, height, width, 2, 32, NEWER.min_pixels, NEWER.max_pixels)
    assert frame_size(clip, LARGER, NEWER) == wanted
    assert tokens_of_clip(clip, LARGER, NEWER) == (count + 1) // 2 * wanted[0] * wanted[1] // 32**2


def test_capped_sizes_are_those_of_transformers() -> None:
    """``cap_pixels_per_frame``: as its processors gave them beside torchvision."""
    older = OLDER.model_copy(update={"max_pixels": 12_845_056 // 8, "most_tokens": 2000})
    newer = NEWER.model_copy(update={"min_pixels": 4096, "max_pixels": 1 << 22, "most_tokens": 768})
    for (height, width, count), wanted in {
        (720, 1280, 2): ((728, 1288), (640, 1152)),
        (720, 1280, 6): ((504, 896), (608, 1088)),
        (512, 512, 12): ((476, 476), (512, 512)),
    }.items():
        clip = stub(height, width, count)
        assert (frame_size(clip, SETTINGS, older), frame_size(clip, LARGER, newer)) == wanted


def reference(images: list[Image.Image], size: tuple[int, int], patch: int, videos: VideoSettings) -> np.ndarray:
    """Patches of transformers' slow processor, frame by frame, two beside each other."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        do_resize=False, patch_size=patch, image_mean=list(videos.mean), image_std=list(videos.std)
    )
    height, width = size
    resized = [image.resize((width, height), Image.Resampling.BICUBIC) for image in images]
    resized += resized[-1:] * (len(resized) % 2)
    found = [processor(images=[image], return_tensors="np")["pixel_values"] for image in resized]
    # a picture's patch holds it twice
    slots = [values.reshape(len(values), 3, 2, patch, patch)[:, :, 0] for values in found]
    pairs = [np.stack(slots[at : at + 2], axis=2).reshape(len(slots[0]), -1) for at in range(0, len(slots), 2)]
    return np.concatenate(pairs)


@pytest.mark.parametrize(("settings", "videos"), [(SETTINGS, OLDER), (LARGER, NEWER)], ids=["older", "newer"])
@pytest.mark.parametrize(("height", "width", "count"), SIZES[:6])
def test_patches_are_those_of_transformers(
    settings: Any, videos: VideoSettings, height: int, width: int, count: int
) -> None:
    images = [*frames(count - 1, width, height), noise(width, height)]
    clip = clip_of(images)
    found = prepare_clip(clip, settings, videos)
    wanted = reference(images, frame_size(clip, settings, videos), settings.patch_size, videos)
    assert len(found) == (count + 1) // 2
    assert np.abs(np.concatenate([picture.pixels for picture in found]) - wanted).max() <= 1e-5
    assert sum(picture.tokens for picture in found) == tokens_of_clip(clip, settings, videos)
    assert len({picture.digest for picture in found}) == len(found)


@pytest.mark.parametrize("fps", [0.3, 1, 2, 3, 7.5, 24, 30, 60])
def test_moments_and_seconds_are_those_of_transformers(fps: float) -> None:
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    clip = stub(64, 64, 41, fps)
    interval = 2 * torch.tensor([2 / fps])[0]
    assert moments(clip, 2, OLDER) == (torch.arange(21) * interval).long().tolist()
    assert moments(clip, 2, OLDER.model_copy(update={"time": "index"})) == list(range(21))
    wanted = Qwen3VLProcessor._calculate_timestamps(None, list(range(41)), fps)
    assert clip.seconds(2) == wanted


def test_what_joins_the_patches_in_time() -> None:
    images = frames(6, 60, 60)
    older, newer = prepare_clip(clip_of(images, 1), SETTINGS, OLDER), prepare_clip(clip_of(images, 1), LARGER, NEWER)
    assert [(one.joined, one.moment) for one in older] == [(False, 0), (True, 4), (True, 8)]
    assert [(one.joined, one.moment) for one in newer] == [(False, 0)] * 3


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_an_animated_file_has_all_its_frames_and_its_own_speed(form: str) -> None:
    images = [image.quantize(32).convert("RGB") for image in frames(5, 70, 50)]
    options = {"lossless": True} if form == "WEBP" else {}
    clip = open_clip(clip_file(images, form, duration=[100, 300, 300, 300, 250], **options), None, where="it")
    assert (clip.count, clip.width, clip.height) == (5, 70, 50)
    assert clip.fps == pytest.approx(4)
    found = list(clip.frames())
    assert len(found) == 5
    for one, image in zip(found, images, strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(image, np.int16)).max() <= 8


def test_a_picture_before_an_animation_is_no_frame_of_it() -> None:
    images = [chart(40, 30), *frames(3, 40, 30)]
    clip = open_clip(clip_file(images, "PNG", default_image=True), None, where="it")
    assert clip.count == 3
    assert np.array_equal(np.asarray(next(clip.frames())), np.asarray(images[1]))


def test_a_file_that_says_no_durations_is_shown_as_browsers_show_it() -> None:
    assert open_clip(clip_file(frames(4, 40, 30), duration=0), None, where="it").fps == pytest.approx(10)


def gif_of(count: int, width: int = 2, height: int = 2) -> bytes:
    """A GIF of so many frames, each of which has some twenty bytes."""
    frame = b",\0\0\0\0" + struct.pack("<HH", 1, 1) + b"\0\x02\x02\x44\x01\0"
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0\0\0\0\xff\xff\xff" + frame * count + b";"


def apng_of(declares: int, has: int) -> bytes:
    controls = [(b"fcTL", struct.pack(">IIIIIHHBB", index, 10, 10, 0, 0, 1, 10, 0, 0)) for index in range(has)]
    return declared(10, 10, ((b"acTL", struct.pack(">II", declares, 0)), *controls))


MP4 = b"\0\0\0\x18ftypmp42" + bytes(200)
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "not a GIF, an APNG or a WebP: send its frames"),
    "a page": (lambda: b"<!doctype html>", "not a GIF, an APNG or a WebP"),
    "mp4": (lambda: MP4, "videos in MP4 are not decoded here: send its frames"),
    "webm": (lambda: b"\x1aE\xdf\xa3" + bytes(99), "videos in WebM are not decoded here"),
    "one frame": (lambda: as_file(chart(40, 30), "GIF"), "one frame: send it as a picture"),
    "a png": (lambda: as_file(chart(40, 30)), "no frames"),
    "100,000 frames": (lambda: gif_of(100_000), "more than 768 frames"),
    "declares 100,000 frames": (lambda: apng_of(100_000, 3), "declares 100,000 frames and has 3"),
    "declares too few": (lambda: apng_of(2, 3), "declares 2 frames and has 3"),
    "bomb": (lambda: gif_of(2, 65_535, 65_535), "far more pixels"),
    "large frames": (lambda: gif_of(2, 4000, 4000), "declares 4000 × 4000 pixels, the most are 8,847,360"),
    "large together": (lambda: gif_of(60, 4000, 2000), "declares 60 × 4000 × 2000 pixels, the most are 400,000,000"),
    "cut in a block": (lambda: clip_file(frames(4, 60, 60))[:300], "ends within a block"),
    "too slow": (lambda: clip_file(frames(2, 20, 20), "PNG", duration=65_535_000), "frames a second, not 0.001"),
    "narrow": (lambda: gif_of(2, 900, 2), "more than 200 times the other: 900 × 2"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_sound_file_is_refused(name: str) -> None:
    make, message = FILES[name]
    with pytest.raises(RequestError, match=message) as fault:
        prepare_clip(open_clip(make(), None, where="messages.0.content.1"), SETTINGS, OLDER)
    assert fault.value.where == "messages.0.content.1"


SMALL, OTHER = as_file(chart(40, 30)), as_file(chart(30, 40))
LISTS: dict[str, tuple[tuple[bytes, ...], float | None, str, str]] = {
    "nothing": ((), None, "it", "no frames; the fewest are 2"),
    "one frame": ((SMALL,), None, "it", "one frame: send it as a picture"),
    "too many": ((SMALL,) * 769, None, "it", "769 frames, the most are 768"),
    "other sizes": ((SMALL, SMALL, OTHER), None, "it.2", "this frame is 30 × 40, the first is 40 × 30"),
    "no picture": ((SMALL, b"<svg/>"), None, "it.1", "not a picture of a known format"),
    "mp4 as a frame": ((SMALL, MP4), None, "it.1", "not a picture of a known format"),
    "bomb": ((SMALL, declared(65_535, 65_535)), None, "it.1", "far more pixels"),
    "large": ((declared(5000, 5000),) * 2, None, "it.0", "the most are 8,847,360"),
    "damaged": ((SMALL, SMALL[:60] + bytes(300)), None, "it.1", "damaged"),
    "fps 0": ((SMALL, SMALL), 0.0, "it", "fps is 0.0, not from 0.001 to 1000"),
    "negative fps": ((SMALL, SMALL), -2.0, "it", "fps is -2.0"),
    "no fps": ((SMALL, SMALL), float("nan"), "it", "fps is nan"),
    "endless fps": ((SMALL, SMALL), float("inf"), "it", "fps is inf"),
}


@pytest.mark.parametrize("name", LISTS)
def test_frames_that_make_no_video_are_refused(name: str) -> None:
    content, fps, where, message = LISTS[name]
    with pytest.raises(RequestError, match=message) as fault:
        prepare_clip(open_clip(content, fps, where="it"), SETTINGS, OLDER)
    assert fault.value.where == where


def test_a_file_takes_no_fps() -> None:
    with pytest.raises(RequestError, match="says its frames a second itself"):
        open_clip(gif_of(4), 2.0, where="it")


def test_bytes_and_pixels_are_bounded() -> None:
    content = clip_file(frames(4, 40, 30))
    for limits, message in (
        (ClipLimits(frame=ImageLimits(most_bytes=100)), "bytes, the most is 100"),
        (ClipLimits(frame=ImageLimits(most_pixels=1000)), "declares 40 × 30 pixels, the most are 1,000"),
        (ClipLimits(most_pixels=4000), "declares 4 × 40 × 30 pixels, the most are 4,000"),
        (ClipLimits(most_frames=3), "more than 3 frames"),
    ):
        with pytest.raises(RequestError, match=message):
            open_clip(content, None, where="it", limits=limits)
    with pytest.raises(RequestError, match="declares 4 × 40 × 30 pixels"):
        open_clip((SMALL,) * 4, None, where="it", limits=ClipLimits(most_pixels=4000))


def test_turned_photographs_are_compared_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = as_file(chart(30, 40), "JPEG", exif=exif.tobytes())
    clip = open_clip((SMALL, turned), None, where="it")
    assert [frame.size for frame in clip.frames()] == [(40, 30)] * 2


# Pillow warns of what it cannot read
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_damaged_bytes_never_raise_anything_else(form: str) -> None:
    content, random = clip_file(frames(3, 40, 30), form), np.random.default_rng(0)
    for _ in range(80):
        changed = bytearray(content)
        for place in random.integers(0, len(content), 4):
            changed[place] = int(random.integers(256))
        with contextlib.suppress(RequestError):
            clip = open_clip(bytes(changed), None, where="it")
            assert len(list(clip.frames())) == clip.count


def test_settings_come_back_from_the_file_and_a_strange_one_is_refused(tmp_path: Path) -> None:
    assert VideoSettings.read(tmp_path) is None
    path = tmp_path / VIDEO_CONFIG
    for settings in (OLDER, NEWER):
        path.write_text(settings.model_dump_json(exclude_none=True))
        assert VideoSettings.read(tmp_path) == settings
    for change, message in (
        ({"library": "evil.so"}, "library"),
        ({"time": "sometimes"}, "time"),
        ({"min_pixels": 10**9}, "min_pixels"),
        ({"min_pixels": 100_000}, "min_pixels is more than max_pixels"),
        ({"std": [0, 1, 1]}, "a deviation in std is 0"),
        ({"mean": [0.5]}, "mean"),
        ({"tokens_per_second": 2}, "tokens_per_second goes with time 'seconds'"),
        ({"vision_end_token_id": None}, "vision_end_token_id goes with time 'timestamps'"),
    ):
        path.write_text(NEWER.model_dump_json(exclude_none=True))
        rewrite_json(path, **change)
        with pytest.raises(ArtifactError, match=message):
            VideoSettings.read(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match="not a plain file"):
        VideoSettings.read(tmp_path)
