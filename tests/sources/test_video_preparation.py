"""What a checkpoint says of the preparation of its videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.errors import SourceError, UnsupportedModelError
from qwen_onnx.sources.video_preparation import VIDEO_PREPROCESSOR, video_preparation_of
from qwen_onnx.sources.vision_config import PREPROCESSOR, QWEN2_5_VL, QWEN2_VL, Tower, tower_of
from tests.sources.test_vision import CONFIG, changed

# Qwen3-VL's, as it is published
PUBLISHED: dict[str, Any] = {
    "size": {"longest_edge": 25165824, "shortest_edge": 4096},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "video_processor_type": "Qwen3VLVideoProcessor",
}
# Qwen2-VL's and Qwen2.5-VL's, which have no file for videos
OLDER: dict[str, Any] = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def older(architecture: str, **vision: Any) -> Tower:
    text = CONFIG["text_config"] | {"rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"}}
    sizes = {"hidden_size": 2048, "out_hidden_size": 2048, "intermediate_size": 3420, "embed_dim": 1280}
    config = CONFIG | {"architectures": [architecture], "text_config": text, "vision_config": sizes | vision}
    return tower_of(config, "here")


def test_the_published_files_are_read(tmp_path: Path) -> None:
    (tmp_path / PREPROCESSOR).write_text(json.dumps(OLDER))
    for architecture, vision, time, rate in (
        (QWEN2_VL, {}, "index", None),
        (QWEN2_5_VL, {"tokens_per_second": 2}, "seconds", 2),
        # as transformers has it
        (QWEN2_5_VL, {}, "seconds", 4),
    ):
        found = video_preparation_of(tmp_path, older(architecture, **vision))
        assert found is not None
        assert (found.time, found.min_pixels, found.max_pixels) == (time, 3136, 12845056)
        assert (found.tokens_per_second, found.most_tokens, found.vision_end_token_id) == (rate, None, None)
    (tmp_path / VIDEO_PREPROCESSOR).write_text(json.dumps(PUBLISHED))
    found = video_preparation_of(tmp_path, tower_of(CONFIG, "here"))
    assert found is not None
    assert (found.time, found.min_pixels, found.max_pixels, found.mean) == ("timestamps", 4096, 25165824, (0.5,) * 3)
    assert found.vision_end_token_id == 151653


def test_what_a_file_does_not_say_is_as_in_transformers(tmp_path: Path) -> None:
    """A Qwen3-VL's processor does not read the bounds of the older ones."""
    (tmp_path / PREPROCESSOR).write_text(json.dumps({"min_pixels": 5000, "max_pixels": 6000, "patch_size": 16}))
    found = video_preparation_of(tmp_path, tower_of(CONFIG, "here"))
    assert found is not None
    assert (found.min_pixels, found.max_pixels) == (128 * 32 * 32, 768 * 32 * 32)
    told = {"cap_pixels_per_frame": True, "size": {"shortest_edge": 10, "longest_edge": 20}}
    (tmp_path / VIDEO_PREPROCESSOR).write_text(json.dumps(told))
    for architecture, tokens in ((QWEN2_VL, 128_000), (QWEN2_5_VL, 128_000)):
        found = video_preparation_of(tmp_path, older(architecture))
        assert found is not None
        assert (found.min_pixels, found.max_pixels, found.most_tokens) == (10, 20, tokens)


def test_without_the_token_behind_a_picture_there_are_no_videos(tmp_path: Path) -> None:
    (tmp_path / VIDEO_PREPROCESSOR).write_text(json.dumps(PUBLISHED))
    assert video_preparation_of(tmp_path, tower_of(changed(vision_end_token_id=None), "here")) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"shortest_edge": 10**6, "longest_edge": 10}}, "the bounds of its pixels are 1000000 and 10"),
        ({"size": {"shortest_edge": "4096", "longest_edge": 10**5}}, "the bounds of its pixels"),
        ({"size": {"shortest_edge": 4096, "longest_edge": 10**12}}, "the bounds of its pixels"),
        ({"patch_size": 14}, "patch_size is 14, the tower has 16"),
        ({"temporal_patch_size": 1}, "temporal_patch_size is 1, the tower has 2"),
        ({"image_mean": "grey"}, "image_mean is not three numbers"),
        ({"image_std": [0, 1, 1]}, "image_std has a zero"),
        ({"do_resize": False}, "do_resize is false"),
        ({"cap_pixels_per_frame": "yes"}, "cap_pixels_per_frame is yes"),
        ({"max_video_tokens": -1}, "max_video_tokens is -1"),
        ({"max_video_tokens": 10**9}, "max_video_tokens is 1000000000"),
    ],
)
def test_what_cannot_be_right_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / VIDEO_PREPROCESSOR).write_text(json.dumps(PUBLISHED | change))
    with pytest.raises(UnsupportedModelError, match=message) as fault:
        video_preparation_of(tmp_path, tower_of(CONFIG, "here"))
    assert fault.value.where == str(tmp_path / VIDEO_PREPROCESSOR)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / VIDEO_PREPROCESSOR).write_text("{")
    with pytest.raises(SourceError):
        video_preparation_of(tmp_path, tower_of(CONFIG, "here"))
