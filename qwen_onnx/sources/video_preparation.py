"""What a checkpoint's files say of the preparation of videos, bounded before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_onnx.artifact.video_config import VideoSettings
from qwen_onnx.errors import UnsupportedModelError
from qwen_onnx.sources.checkpoint import read_json
from qwen_onnx.sources.vision_config import LARGEST_PICTURE, PREPROCESSOR, Time, Tower, sound_normalisation

VIDEO_PREPROCESSOR = "video_preprocessor_config.json"
# what transformers takes where a file says nothing: bounds of pixels, and of tokens with ``cap_pixels_per_frame``
USUAL: dict[Time, tuple[int, int, int]] = {
    "index": (128 * 28**2, 768 * 28**2, 128_000),
    "seconds": (128 * 28**2, 768 * 28**2, 128_000),
    "timestamps": (128 * 32**2, 768 * 32**2, 768),
}
MOST_TOKENS = 1 << 24


def video_preparation_of(folder: Path, tower: Tower) -> VideoSettings | None:
    """Of a checkpoint: from ``video_preprocessor_config.json``, or as transformers reads the pictures' file without it.

    Returns:
        None: its config does not name the token behind a picture, without which a Qwen3-VL reads no video.

    Raises:
        UnsupportedModelError: it says what no tower can use, or contradicts the tower.
        SourceError: the file is damaged.
    """
    name = VIDEO_PREPROCESSOR if (folder / VIDEO_PREPROCESSOR).exists() else PREPROCESSOR
    told, time, faults = read_json(folder / name), tower.style.time, list[str]()
    if time == "timestamps" and tower.vision_end is None:
        return None
    least, most = bounds_of(told, time)
    if not (type(least) is int and type(most) is int and 1 <= least <= most <= LARGEST_PICTURE):
        faults.append(f"the bounds of its pixels are {str(least)[:20]} and {str(most)[:20]}")
    capped, tokens = told.get("cap_pixels_per_frame"), told.get("max_video_tokens", USUAL[time][2])
    if capped not in (None, True, False):
        faults.append(f"cap_pixels_per_frame is {str(capped)[:20]}")
    if not (type(tokens) is int and 1 <= tokens <= MOST_TOKENS):
        faults.append(f"max_video_tokens is {str(tokens)[:20]}")
    mean, std = sound_normalisation(told, tower, faults)
    if faults:
        raise UnsupportedModelError(
            f"the preparation of videos cannot be right: {'; '.join(faults)}",
            where=str(folder / name),
            hint="use the model's own file",
        )
    return VideoSettings(
        time=time,
        min_pixels=least,
        max_pixels=most,
        most_tokens=tokens if capped else None,
        mean=mean,
        std=std,
        tokens_per_second=tower.per_second if time == "seconds" else None,
        vision_end_token_id=tower.vision_end if time == "timestamps" else None,
    )


def bounds_of(told: dict[str, Any], time: Time) -> tuple[Any, Any]:
    """Fewest and most pixels; Qwen3-VL's processor does not read the older names."""
    given = told.get("size")
    size: dict[str, Any] = given if isinstance(given, dict) else {}
    older = {} if time == "timestamps" else told
    least = older.get("min_pixels") or size.get("shortest_edge") or USUAL[time][0]
    return least, older.get("max_pixels") or size.get("longest_edge") or USUAL[time][1]
