"""Sounds as the audio encoder takes them, in NumPy and soundfile: decoded, resampled, as a log-mel spectrogram.

What is computed is what transformers' ``WhisperFeatureExtractor`` computes for Qwen2-Audio, and its
``Qwen3ASRFeatureExtractor`` for one sound. A sound comes from strangers: its first bytes choose the format from a
short list, and no more is decoded than the model hears.
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from qwen_onnx.artifact.audio_config import AudioSettings
from qwen_onnx.errors import EnvironmentFault, RequestError
from qwen_onnx.runtime.engines.media import Sound
from qwen_onnx.runtime.processing.data_uri import MOST_BYTES
from qwen_onnx.runtime.processing.resample import Samples, resample

Format = Literal["wav", "flac", "mp3"]
# libsndfile's names; it knows many more, whose decoders nobody needs here
FORMATS: dict[Format, tuple[str, ...]] = {"wav": ("WAV", "WAVEX"), "flac": ("FLAC",), "mp3": ("MP3",)}
# as browsers call them
MEDIA_TYPES: dict[str, Format] = {
    "audio/wav": "wav",
    "audio/x-wav": "wav",
    "audio/wave": "wav",
    "audio/vnd.wave": "wav",
    "audio/flac": "flac",
    "audio/x-flac": "flac",
    "audio/mpeg": "mp3",
    "audio/mp3": "mp3",
}
# of WAV; the others are codecs of their own
PLAIN = frozenset({"PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"})
BLOCK = 1 << 16
CHUNK_HEAD, STREAMED = 8, 0xFFFFFFFF
FEWEST_RATE, MOST_RATE, MOST_CHANNELS = 4000, 192_000, 8
# of the mel scale, by Slaney: linear up to 1 kHz, then logarithmic
HIGHEST, KNEE, LINEAR, STEP = 8000.0, 1000.0, 200 / 3, math.log(6.4) / 27
FLOOR, RANGE = 1e-10, 8.0
# of a spectrogram at once: their windows are copied
PIECE = 2048


@dataclass(frozen=True)
class SoundLimits:
    """What one sound may cost; how long it may be is the model's.

    Attributes:
        most_samples: of one channel, before they are resampled: twenty minutes at 48 kHz.
    """

    most_bytes: int = MOST_BYTES
    most_samples: int = 1200 * 48_000


def require_decoder() -> None:
    """EnvironmentFault unless sounds can be decoded."""
    try:
        import soundfile  # noqa: F401
    # OSError: the package is there, the library that it loads is not
    except (ImportError, OSError) as error:
        raise EnvironmentFault(f"soundfile does not load: {error}", hint="pip install 'qwen-onnx[serve]'") from error


def format_of(content: bytes) -> Format | None:
    """By the first bytes; None: none that is read here."""
    if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
        return "wav"
    if content[:4] == b"fLaC":
        return "flac"
    # MPEG audio, layer III: eleven bits of a frame's beginning, or tags before it
    framed = len(content) > 2 and content[0] == 0xFF and content[1] & 0xE6 == 0xE2
    return "mp3" if framed or content[:3] == b"ID3" else None


def decode_sound(
    content: bytes,
    settings: AudioSettings,
    *,
    where: str,
    declared: str | None = None,
    limits: SoundLimits = SoundLimits(),
) -> Samples:
    """The sound in ``content``, its channels' mean, resampled for the model.

    Args:
        declared: the format that the request says; None: whatever it is.

    Raises:
        RequestError: too many bytes or seconds, too short, a format that is not read here or another one than is
            declared, damaged or cut off. Names ``where``.
    """
    if len(content) > limits.most_bytes:
        raise RequestError(f"the sound has {len(content):,} bytes, the most is {limits.most_bytes:,}", where=where)
    found = format_of(content)
    if found is None:
        raise RequestError(f"this is not a sound of a known format: {', '.join(FORMATS)}", where=where)
    if declared not in (None, found):
        raise RequestError(f"the request says {declared}, the sound is {found}", where=where)
    samples, rate = _decoded(content, found, _Most(settings.chunk_length, limits.most_samples), where)
    if not np.isfinite(samples).all():
        raise _damaged("it holds samples that are no numbers", where)
    heard = resample(samples, rate, settings.sampling_rate)
    if not settings.tokens_of(settings.frames_of(len(heard))):
        raise RequestError(
            f"the sound has {len(samples):,} samples, too few for a token", where=where, hint="send a longer one"
        )
    return heard


@dataclass(frozen=True)
class _Most:
    """Seconds that a model hears, and samples that are decoded."""

    seconds: int
    samples: int

    def check(self, count: int, rate: int, where: str) -> None:
        """RequestError for more samples of this rate."""
        if count > self.seconds * rate:
            raise RequestError(
                f"the sound lasts {count / rate:,.1f} s, the model hears {self.seconds} s",
                where=where,
                hint="cut it, or send parts of it",
            )
        if count > self.samples:
            raise RequestError(
                f"the sound has {count:,} samples or more, the most are {self.samples:,}",
                where=where,
                hint="send it at a lower rate, or parts of it",
            )


def _decoded(content: bytes, kind: Format, limit: _Most, where: str) -> tuple[Samples, int]:
    """Samples and their rate."""
    import soundfile

    _require_whole(content, kind, where)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            if file.format not in FORMATS[kind] or (kind == "wav" and file.subtype not in PLAIN):
                raise RequestError(f"sounds of {file.format} in {file.subtype} are not read", where=where)
            _check_form(file, limit, where)
            parts, count = [], 0
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                parts.append(block.mean(axis=1))
                count += len(block)
                # a header need not say how much follows
                limit.check(count, file.samplerate, where)
            # of MP3 it is an estimate, unless the encoder left the number
            told = kind != "mp3" or b"Xing" in content[:BLOCK] or b"Info" in content[:BLOCK]
            if told and count < file.frames:
                raise _damaged(f"it declares {file.frames:,} samples and has {count:,}", where)
            return np.concatenate(parts) if parts else np.zeros(0, np.float32), file.samplerate
    except (soundfile.SoundFileError, OSError, ValueError, RuntimeError) as error:
        raise _damaged(str(error), where) from error


def _check_form(file: Any, limit: _Most, where: str) -> None:
    """RequestError for what its header says."""
    if not FEWEST_RATE <= file.samplerate <= MOST_RATE:
        told = f"the sound has {file.samplerate:,} samples a second, not {FEWEST_RATE:,} to {MOST_RATE:,}"
        raise RequestError(told, where=where)
    if file.channels > MOST_CHANNELS:
        raise RequestError(f"the sound has {file.channels} channels, the most are {MOST_CHANNELS}", where=where)
    limit.check(file.frames, file.samplerate, where)


def _require_whole(content: bytes, kind: Format, where: str) -> None:
    """RequestError for a WAV that ends before its samples do, which libsndfile reads without a word."""
    at = 12
    while kind == "wav" and at + CHUNK_HEAD <= len(content):
        size = int.from_bytes(content[at + 4 : at + CHUNK_HEAD], "little")
        left = len(content) - at - CHUNK_HEAD
        if content[at : at + 4] == b"data" and STREAMED != size > left:
            raise _damaged(f"it declares {size:,} bytes of samples and has {left:,}", where)
        at += CHUNK_HEAD + size + size % 2


def _damaged(why: str, where: str) -> RequestError:
    return RequestError(f"the sound is damaged: {why.strip()}", where=where, hint="save it again")


def prepare_sound(samples: Samples, settings: AudioSettings) -> Sound:
    """Samples at the model's rate as the encoder takes them."""
    frames = settings.frames_of(len(samples))
    if settings.chunk is None:
        # two convolutions see two frames of what is behind the sound; of more silence no token hears anything
        filled, given = settings.samples, min(frames + 2, settings.frames)
    else:
        filled, given = max(len(samples), settings.min_length), frames
    mel = _log_mel(np.pad(samples[:filled], (0, max(0, filled - len(samples)))), given, settings)
    if settings.chunk is not None:
        # behind the spectrogram, where no sound is but what transformers fills it with
        mel = np.pad(mel, ((0, 0), (0, -frames % settings.chunk)))
    digest = hashlib.sha256(repr((mel.shape, frames)).encode() + mel.tobytes()).hexdigest()
    return Sound(mel, frames, settings.tokens_of(frames), digest)


def _log_mel(samples: Samples, frames: int, settings: AudioSettings) -> Samples:
    """The first ``frames`` of a spectrogram, float32 [bands, frames]."""
    size, found = settings.n_fft, np.empty((settings.feature_size, frames))
    padded = np.pad(samples, size // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)[:: settings.hop_length][:frames]
    for begin in range(0, frames, PIECE):
        power = np.abs(np.fft.rfft(windows[begin : begin + PIECE] * np.hanning(size + 1)[:-1])) ** 2
        found[:, begin : begin + PIECE] = np.log10(np.maximum(_filters(settings) @ power.T, FLOOR))
    np.maximum(found, found.max() - RANGE, out=found)
    return ((found + 4) / 4).astype(np.float32)


def _mel(hertz: float) -> float:
    return hertz / LINEAR if hertz < KNEE else KNEE / LINEAR + math.log(hertz / KNEE) / STEP


@cache
def _filters(settings: AudioSettings) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Triangles of equal area over the frequencies of a frame, [bands, n_fft / 2 + 1]."""
    marks = np.linspace(0, _mel(HIGHEST), settings.feature_size + 2)
    knee = KNEE / LINEAR
    edges = np.where(marks < knee, marks * LINEAR, KNEE * np.exp(STEP * (np.maximum(marks, knee) - knee)))
    hertz = np.linspace(0, settings.sampling_rate // 2, settings.n_fft // 2 + 1)
    slopes = (hertz - edges[:, None]) / np.append(np.diff(edges), 1.0)[:, None]
    triangles = np.maximum(0, np.minimum(slopes[:-2], -(hertz - edges[2:, None]) / np.diff(edges)[1:, None]))
    return np.asarray(triangles * (2 / (edges[2:] - edges[:-2]))[:, None])
