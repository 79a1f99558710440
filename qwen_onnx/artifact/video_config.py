"""``video_config.json``: how videos are prepared for a model that sees; onnxruntime-genai has no file for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qwen_onnx.artifact.processor_config import Pixels, Three
from qwen_onnx.bounded import read_record
from qwen_onnx.errors import ArtifactError
from qwen_onnx.records import Record

VIDEO_CONFIG = "video_config.json"
MOST_CONFIG = 64 << 10
MOST_PER_SECOND = 1000.0


class VideoSettings(Record):
    """How the frames of a video become patches and what tells a model when they were taken.

    Attributes:
        time: ``index``: frames that make a patch count one position in time each (Qwen2-VL); ``seconds``: positions in
            time are seconds times ``tokens_per_second`` (Qwen2.5-VL); ``timestamps``: seconds stand as text before
            each patch in time, whose tokens are those of a picture (Qwen3-VL, Qwen3.5).
        min_pixels, max_pixels: of one frame; with ``timestamps`` of all frames together.
        most_tokens: ``max_video_tokens`` of a processor with ``cap_pixels_per_frame``; None: there is no such bound.
        mean, std: of each channel.
        tokens_per_second: with ``seconds`` alone.
        vision_end_token_id: with ``timestamps`` alone, behind the tokens of each patch in time.
    """

    time: Literal["index", "seconds", "timestamps"]
    min_pixels: Pixels
    max_pixels: Pixels
    most_tokens: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    mean: Three
    std: Three
    tokens_per_second: Annotated[float, Field(gt=0, le=MOST_PER_SECOND)] | None = None
    vision_end_token_id: Annotated[int, Field(ge=0, le=1 << 24)] | None = None

    @model_validator(mode="after")
    def _says_what_it_needs(self) -> Self:
        if self.min_pixels > self.max_pixels:
            raise ValueError("min_pixels is more than max_pixels")
        if not all(self.std):
            raise ValueError("a deviation in std is 0")
        for name, time in (("tokens_per_second", "seconds"), ("vision_end_token_id", "timestamps")):
            if (getattr(self, name) is not None) != (self.time == time):
                raise ValueError(f"{name} goes with time {time!r}, and with that alone")
        return self

    @classmethod
    def read(cls, folder: Path) -> VideoSettings | None:
        """From ``video_config.json`` of an artifact; None: it has none, as before there were videos.

        Raises:
            ArtifactError: it says what it may not.
        """
        path = folder / VIDEO_CONFIG
        if not path.exists() and not path.is_symlink():
            return None
        return read_record(path, cls, most_bytes=MOST_CONFIG, error=ArtifactError)
