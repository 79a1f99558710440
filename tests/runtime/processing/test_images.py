"""Pictures: parity with transformers' slow processor, and what is refused."""

from __future__ import annotations

import contextlib
import io
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from qwen_onnx.artifact.processor_config import PROCESSOR_CONFIG, ImageSettings
from qwen_onnx.errors import ArtifactError, RequestError
from qwen_onnx.runtime.processing.images import (
    ImageLimits,
    decode_image,
    prepare,
    smart_resize,
)
from tests.conftest import rewrite_json
from tests.fixtures.pictures import SETTINGS, as_file, chart, declared, noise, write_processor


@pytest.fixture(scope="module")
def slow_processor() -> Any:
    """Of transformers, without torchvision."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": SETTINGS.min_pixels, "longest_edge": SETTINGS.max_pixels},
        patch_size=SETTINGS.patch_size,
        merge_size=SETTINGS.merge_size,
        image_mean=list(SETTINGS.mean),
        image_std=list(SETTINGS.std),
    )


def palette(image: Image.Image) -> Image.Image:
    return image.quantize(16)


def turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return as_file(image, "JPEG", exif=exif.tobytes())


def animated(image: Image.Image) -> bytes:
    return as_file(image, "GIF", save_all=True, append_images=[image.transpose(Image.Transpose.ROTATE_180)] * 3)


PICTURES: dict[str, Callable[[], bytes]] = {
    "no resize": lambda: as_file(noise(112, 168)),
    "chart": lambda: as_file(chart(331, 217)),
    "jpeg": lambda: as_file(chart(640, 480), "JPEG"),
    "webp": lambda: as_file(chart(100, 300), "WEBP"),
    "bmp": lambda: as_file(noise(57, 31), "BMP"),
    "grey": lambda: as_file(chart(90, 90).convert("L")),
    "two colours": lambda: as_file(chart(90, 90).convert("1")),
    "palette": lambda: as_file(palette(chart(200, 120))),
    "alpha": lambda: as_file(chart(64, 64).convert("RGBA").rotate(20)),
    "grey with alpha": lambda: as_file(chart(64, 64).convert("LA")),
    "cmyk": lambda: as_file(chart(80, 60).convert("CMYK"), "JPEG"),
    "one pixel": lambda: as_file(noise(1, 1)),
    "narrow": lambda: as_file(noise(2, 398)),
    "large": lambda: as_file(noise(900, 1300), "JPEG"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_patches_are_those_of_transformers(name: str, slow_processor: Any) -> None:
    """With a resize too: Pillow computes it on both sides."""
    content = PICTURES[name]()
    wanted = slow_processor(images=[Image.open(io.BytesIO(content)).convert("RGB")], return_tensors="np")
    found = prepare(decode_image(content, where="it"), SETTINGS, where="it")
    assert [list(found.grid)] == wanted["image_grid_thw"].tolist()
    assert found.tokens == np.prod(found.grid) // SETTINGS.merge_size**2
    assert found.pixels.dtype == np.float32
    assert np.abs(found.pixels - wanted["pixel_values"]).max() <= 1e-5


def test_a_photograph_is_turned_as_its_exif_says() -> None:
    image = chart(160, 90)
    upright = decode_image(turned(image), where="it")
    assert upright.size == (90, 160)
    plain = decode_image(as_file(image, "JPEG"), where="it").transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(upright), np.asarray(plain))


def test_the_first_frame_of_an_animated_picture_is_taken() -> None:
    image = palette(chart(80, 60)).convert("RGB")
    found = np.asarray(decode_image(animated(image), where="it"), np.int16)
    assert np.abs(found - np.asarray(image, np.int16)).max() <= 8


def test_sixteen_bits_of_grey_are_the_upper_eight() -> None:
    """Pillow alone would make everything above 255 white."""
    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    found = np.asarray(decode_image(as_file(Image.fromarray(ramp)), where="it"))
    assert np.array_equal(found[..., 0], ramp >> 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (b"<!doctype html><title>a.png</title>", "not a picture"),
        (b"\x89PNG\r\n\x1a\n", "not a picture|damaged"),
        (declared(65535, 65535), "declares far more pixels"),
        (declared(9000, 9000), "declares 9000 × 9000 pixels, the most are 40,000,000"),
        (declared(0, 7), "not a picture|damaged|cannot be used"),
        (declared(500, 500), "damaged"),
        (as_file(noise(300, 300))[:20_000], "damaged"),
        (as_file(noise(300, 300), "JPEG")[:2_000], "damaged"),
        (as_file(chart(30, 30), "TIFF"), "not a picture"),
        (as_file(noise(4000, 1)), "more than 200 times the other: 4000 × 1"),
    ],
)
def test_what_is_no_sound_picture_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message) as fault:
        prepare(decode_image(content, where="messages.0.content.1"), SETTINGS, where="messages.0.content.1")
    assert fault.value.where == "messages.0.content.1"


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_what_is_packed_beside_the_pixels_is_bounded(kind: bytes) -> None:
    """64 MiB in 64 KB: a text or a profile that is never asked for must not be unpacked whole."""
    packed = zlib.compress(bytes(64 << 20), 1)
    head = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0"}[kind]
    content = declared(10, 10, ((kind, head + packed),))
    del packed
    tracemalloc.start()
    with contextlib.suppress(RequestError):
        assert decode_image(content, where="it").size == (10, 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_bytes_and_pixels_are_bounded() -> None:
    content = as_file(noise(40, 40))
    with pytest.raises(RequestError, match="bytes, the most is 100"):
        decode_image(content, where="it", limits=ImageLimits(most_bytes=100))
    with pytest.raises(RequestError, match="declares 40 × 40 pixels, the most are 1,000"):
        decode_image(content, where="it", limits=ImageLimits(most_pixels=1000))


# Pillow warns of EXIF that it cannot read
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_never_raise_anything_else() -> None:
    """Every format with bytes changed: a picture, or a RequestError."""
    random = np.random.default_rng(0)
    for content in (
        as_file(chart(40, 30)),
        as_file(chart(40, 30), "JPEG"),
        animated(chart(20, 20)),
        turned(chart(9, 9)),
    ):
        for _ in range(60):
            changed = bytearray(content)
            for place in random.integers(0, len(content), 6):
                changed[place] = int(random.integers(256))
            with contextlib.suppress(RequestError):
                assert decode_image(bytes(changed), where="it").mode == "RGB"


@pytest.mark.parametrize(("height", "width"), [(1, 1), (28, 28), (41, 43), (70, 98), (1000, 5), (3000, 2000)])
def test_sizes_are_those_of_transformers(height: int, width: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    bounds = {"factor": 28, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
    assert smart_resize(height, width, **bounds) == theirs(height, width, **bounds)


def test_settings_come_back_from_the_file_and_a_strange_one_is_refused(tmp_path: Path) -> None:
    write_processor(tmp_path)
    assert ImageSettings.read(tmp_path) == SETTINGS
    path = tmp_path / PROCESSOR_CONFIG
    for change, message in (
        ({"library": "evil.so"}, "library"),
        ({"processor": {"name": "p", "transforms": []}}, "transforms"),
        ({"processor": {"name": "p", "transforms": [{"operation": {"name": "d", "type": "DecodeImage"}}]}}, "say"),
        ({"processor": {"name": "p", "transforms": [{"operation": {"name": "d", "type": "Run"}}]}}, "type"),
    ):
        rewrite_json(path, **change)
        with pytest.raises(ArtifactError, match=message):
            ImageSettings.read(tmp_path)
        write_processor(tmp_path)
    path.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        ImageSettings.read(tmp_path)


def test_equal_pictures_have_one_digest() -> None:
    first, second = (prepare(decode_image(as_file(chart(64, 64)), where="it"), SETTINGS, where="it") for _ in "12")
    other = chart(64, 64)
    ImageDraw.Draw(other).point((3, 3), "red")
    assert first.digest == second.digest
    assert first.digest != prepare(other, SETTINGS, where="it").digest
