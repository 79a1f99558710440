"""``audio_config.json``: how sounds are prepared for a model that hears; onnxruntime-genai has no file for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from qwen_onnx.bounded import read_record
from qwen_onnx.errors import ArtifactError
from qwen_onnx.records import Record

AUDIO_CONFIG = "audio_config.json"
MOST_CONFIG = 64 << 10


class AudioSettings(Record):
    """How a sound becomes a log-mel spectrogram; the names are those of transformers' feature extractor.

    Attributes:
        feature_size: bands of the mel scale.
        sampling_rate: samples a second; n_fft, hop_length: samples of a frame, and from one to the next.
        chunk_length: the most seconds that are heard.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    feature_size: Annotated[int, Field(ge=1, le=512)]
    sampling_rate: Annotated[int, Field(ge=8000, le=48_000)]
    n_fft: Annotated[int, Field(ge=16, le=4096)]
    hop_length: Annotated[int, Field(ge=16, le=4096)]
    chunk_length: Annotated[int, Field(ge=1, le=120)]

    @model_validator(mode="after")
    def _whole_frames(self) -> Self:
        if self.samples % self.hop_length:
            raise ValueError("chunk_length is not a whole number of frames")
        return self

    @property
    def samples(self) -> int:
        """The most that are heard."""
        return self.chunk_length * self.sampling_rate

    @property
    def frames(self) -> int:
        """Of a sound of ``chunk_length`` seconds."""
        return self.samples // self.hop_length

    @classmethod
    def read(cls, folder: Path) -> AudioSettings:
        """From ``audio_config.json`` of an artifact; ArtifactError when it is missing or says what it may not."""
        return read_record(folder / AUDIO_CONFIG, cls, most_bytes=MOST_CONFIG, error=ArtifactError)
