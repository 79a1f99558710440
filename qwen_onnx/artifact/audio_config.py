"""``audio_config.json``: how sounds are prepared for a model that hears; onnxruntime-genai has no file for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from qwen_onnx.bounded import read_record
from qwen_onnx.errors import ArtifactError
from qwen_onnx.records import Record

AUDIO_CONFIG = "audio_config.json"
# what genai_config.json calls a model that hears, and one that hears and makes transcripts
HEARS, TRANSCRIBES = "qwen2_audio", "qwen3_asr"
MOST_CONFIG = 64 << 10
# frames of a chunk of which three convolutions make a token; seconds that every sound may be filled up to
REDUCED, MOST_FILLED = 8, 120


class AudioSettings(Record):
    """How a sound becomes a log-mel spectrogram; the names are those of transformers' feature extractor.

    Attributes:
        feature_size: bands of the mel scale.
        sampling_rate: samples a second; n_fft, hop_length: samples of a frame, and from one to the next.
        chunk_length: the most seconds that are heard.
        min_length: samples that a shorter sound is filled up to.
        chunk: frames that are convolved together, eight of which make a token; None: a sound is filled up to
            ``chunk_length`` seconds, and four make one.
        window: frames within which tokens hear each other, and which the encoder gets at a time; None: all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    feature_size: Annotated[int, Field(ge=1, le=512)]
    sampling_rate: Annotated[int, Field(ge=8000, le=48_000)]
    n_fft: Annotated[int, Field(ge=16, le=4096)]
    hop_length: Annotated[int, Field(ge=16, le=4096)]
    chunk_length: Annotated[int, Field(ge=1, le=1200)]
    min_length: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    chunk: Annotated[int, Field(ge=8, le=1 << 12)] | None = None
    window: Annotated[int, Field(ge=8, le=1 << 14)] | None = None

    @model_validator(mode="after")
    def _whole_frames(self) -> Self:
        if self.samples % self.hop_length:
            raise ValueError("chunk_length is not a whole number of frames")
        if (self.chunk is None) != (self.window is None):
            raise ValueError("chunk and window go together")
        if self.chunk is None:
            # every sound is filled up to it
            if self.chunk_length > MOST_FILLED:
                raise ValueError(f"chunk_length is more than {MOST_FILLED} s")
        elif (self.window or 0) % self.chunk:
            raise ValueError("window is not a whole number of chunks")
        elif self.min_length < max(self.n_fft, self.hop_length):
            # the reflected ends need as many
            raise ValueError("min_length is less than a frame")
        return self

    @property
    def samples(self) -> int:
        """The most that are heard."""
        return self.chunk_length * self.sampling_rate

    @property
    def frames(self) -> int:
        """Of a sound of ``chunk_length`` seconds."""
        return self.samples // self.hop_length

    def frames_of(self, samples: int) -> int:
        """How many of the spectrogram are of a sound of so many samples."""
        heard = min(samples, self.samples)
        if self.chunk is None:
            return -(-heard // self.hop_length)
        return max(heard, self.min_length) // self.hop_length if heard else 0

    def tokens_of(self, frames: int) -> int:
        """How many tokens of a prompt so many frames take."""
        if self.chunk is None:
            # an average of two steps, of which the encoder has one for two frames
            return (frames + 1) // 2 // 2
        whole, rest = divmod(frames, self.chunk)
        return whole * -(-self.chunk // REDUCED) + -(-rest // REDUCED)

    @classmethod
    def read(cls, folder: Path) -> AudioSettings:
        """From ``audio_config.json`` of an artifact; ArtifactError when it is missing or says what it may not."""
        return read_record(folder / AUDIO_CONFIG, cls, most_bytes=MOST_CONFIG, error=ArtifactError)
