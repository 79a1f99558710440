"""Sounds: parity with transformers' feature extractor, and what is refused."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_onnx.artifact.audio_config import AUDIO_CONFIG, AudioSettings
from qwen_onnx.errors import ArtifactError, RequestError
from qwen_onnx.runtime.processing.audio import SoundLimits, decode_sound, format_of, prepare_sound
from qwen_onnx.runtime.processing.resample import resample
from tests.conftest import rewrite_json
from tests.fixtures.sounds import RATE, SETTINGS, Array, as_sound, hiss, sweep, tone
from tests.fixtures.speech import SETTINGS as CHUNKED

PLACE = "messages.0.content.1.input_audio"


@pytest.fixture(scope="module")
def extractor() -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=SETTINGS.feature_size)


SOUNDS: dict[str, Array] = {
    "tone": tone(440, 3.01),
    "silence": np.zeros(RATE, np.float32),
    "noise": hiss(2),
    "sweep": sweep(5),
    "tone and noise": tone(440, 1) + hiss(1) / 100,
    # frames in even and odd numbers, and the fewest
    "three frames": hiss(0.021),
    "four frames": hiss(0.04),
    "five frames": hiss(0.0401),
    "thirty seconds": hiss(30),
    "almost thirty": hiss(29.985),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_spectrograms_are_those_of_transformers(name: str, extractor: Any) -> None:
    """Of its two ways NumPy's within 1e-5; PyTorch's, which it takes where there is one, rounds its FFT to float32."""
    samples = SOUNDS[name]
    found = prepare_sound(samples, SETTINGS)
    wanted = extractor(samples, sampling_rate=RATE, padding="max_length", return_attention_mask=True)
    frames = int(np.asarray(wanted["attention_mask"]).sum())
    assert found.frames == frames
    # as Qwen2AudioProcessor counts them
    assert found.tokens == (((frames - 1) // 2 + 1) - 2) // 2 + 1
    padded = np.pad(samples, (0, SETTINGS.samples - len(samples)))
    exact = extractor._np_extract_fbank_features(padded[None], "cpu")[0]
    assert found.mel.dtype == np.float32
    given = found.mel.shape[1]
    assert given == min(frames + 2, SETTINGS.frames)
    assert np.abs(found.mel - exact[:, :given]).max() <= 1e-5
    assert np.abs(found.mel - np.asarray(wanted["input_features"])[0][:, :given]).max() <= 2e-4


# the least, what is filled up, and lengths that neither a frame nor a chunk divides; the last is read in pieces
@pytest.mark.parametrize("samples", [1, 1600, 7999, 8000, 8159, 8160, 16_161, 40_000, 500_123])
def test_spectrograms_of_any_length_are_those_of_transformers(samples: int) -> None:
    """Qwen3-ASR's, whose FFT PyTorch rounds to float32."""
    from transformers import Qwen3ASRFeatureExtractor

    heard = hiss(samples / RATE + 0.01)[:samples]
    found = prepare_sound(heard, CHUNKED)
    wanted = Qwen3ASRFeatureExtractor()(heard, sampling_rate=RATE, padding=True, return_attention_mask=True)
    assert found.frames == int(wanted["attention_mask"].sum())
    # as Qwen3ASRProcessor counts them
    whole, rest = divmod(found.frames, 100)
    assert found.tokens == 13 * whole + ((((rest - 1) // 2 + 1 - 1) // 2 + 1) - 1) // 2 + 1
    assert found.mel.dtype == np.float32
    assert found.mel.shape == wanted["input_features"].shape[1:]
    assert np.abs(found.mel - wanted["input_features"][0].numpy()).max() <= 2e-4


def test_twenty_minutes_are_heard_and_no_more() -> None:
    """Whatever a file says: it is FLAC of silence, of some kilobytes."""
    silence = as_sound(np.zeros(1200 * 8000, np.float32), 8000, form="FLAC")
    assert len(silence) < 1 << 20
    assert len(decode_sound(silence, CHUNKED, where="it")) == 1200 * RATE
    with pytest.raises(RequestError, match=r"lasts 1,200\.1 s, the model hears 1200 s"):
        decode_sound(as_sound(np.zeros(1200 * 8000 + 800, np.float32), 8000, form="FLAC"), CHUNKED, where="it")
    with pytest.raises(RequestError, match="samples or more, the most are 16,000"):
        decode_sound(as_sound(hiss(1.1)), CHUNKED, where="it", limits=SoundLimits(most_samples=RATE))
    with pytest.raises(RequestError, match="0 samples, too few"):
        decode_sound(as_sound(np.zeros(0, np.float32)), CHUNKED, where="it")


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000])
def test_a_tone_of_any_rate_is_that_tone(rate: int) -> None:
    """In the middle; within some milliseconds of its ends a tone that stops at once is not one of its frequency."""
    found = resample(tone(1000, 1, rate) + tone(3100, 1, rate), rate, RATE)
    wanted = tone(1000, 1) + tone(3100, 1)
    assert len(found) == len(wanted)
    assert np.abs(found - wanted)[1500:-1500].max() <= 5e-6
    # their spectrograms, of 0 to 1.5
    mels = [prepare_sound(samples[1600:-1600], SETTINGS).mel for samples in (found, wanted)]
    assert np.abs(mels[0] - mels[1])[:, 3:-3].max() <= 2e-2


def test_nothing_above_the_band_comes_down_into_it() -> None:
    assert np.abs(resample(tone(9500, 1, 48_000), 48_000, RATE))[1500:-1500].max() <= 1e-5


@pytest.mark.parametrize(
    ("form", "subtype", "diff"),
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "FLOAT", 0),
        ("WAV", "ULAW", 0.02),
        ("WAVEX", "PCM_16", 1e-4),
        ("FLAC", "PCM_16", 1e-4),
    ],
)
def test_files_give_their_samples(form: str, subtype: str, diff: float) -> None:
    samples = hiss(0.2)
    found = decode_sound(as_sound(samples, form=form, subtype=subtype), SETTINGS, where="it")
    assert np.abs(found - samples).max() <= diff


def test_mp3_sounds_as_it_did() -> None:
    """As long, and as loud in each band but for what the codec takes away."""
    samples = tone(440, 1) + tone(880, 1) / 2
    content = as_sound(samples, form="MP3")
    assert format_of(content) == "mp3"
    found = decode_sound(content, SETTINGS, where="it", declared="mp3")
    assert len(found) == len(samples)
    assert np.corrcoef(found[800:-800], samples[800:-800])[0, 1] > 0.999


def test_channels_become_their_mean() -> None:
    left, right = tone(440, 0.1), hiss(0.1)
    both = np.stack([left, right], axis=1)
    found = decode_sound(as_sound(both, subtype="FLOAT"), SETTINGS, where="it")
    assert np.abs(found - (left + right) / 2).max() <= 1e-7


def wav(*chunks: tuple[bytes, bytes], size: int | None = None) -> bytes:
    """A WAV of these chunks; ``size`` is what the last one declares."""
    parts = [
        name + struct.pack("<I", len(body) if size is None or index + 1 < len(chunks) else size) + body
        for index, (name, body) in enumerate(chunks)
    ]
    return b"RIFF" + struct.pack("<I", 4 + sum(map(len, parts))) + b"WAVE" + b"".join(parts)


def head(channels: int = 1, rate: int = RATE, code: int = 1) -> tuple[bytes, bytes]:
    """The chunk that says what the samples are, 16 bits each."""
    return b"fmt ", struct.pack("<HHIIHH", code, channels, rate, 2 * rate * channels, 2 * channels, 16)


SAMPLES = (b"data", bytes(6400))
MP3, FLAC = as_sound(hiss(1), form="MP3"), as_sound(hiss(1), form="FLAC")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a sound of a known format: wav, flac, mp3"),
        (b"<!doctype html><title>a.wav</title>", "not a sound"),
        (as_sound(hiss(0.1), form="OGG"), "not a sound"),
        (as_sound(hiss(0.1), form="AIFF"), "not a sound"),
        (b"RIFF\0\0\0\0WAVE", "damaged"),
        (b"fLaC", "damaged"),
        (b"ID3", "damaged"),
        (b"\xff\xfb" + bytes(100), "damaged"),
        (wav(head()), "damaged"),
        (wav(head(), (b"data", b"")), "0 samples, too few"),
        (wav(head(), (b"data", bytes(640))), "320 samples, too few for a token"),
        (wav(head(), SAMPLES, size=1 << 30), "declares 1,073,741,824 bytes of samples and has 6,400"),
        (wav(head(), SAMPLES)[:-100], "declares 6,400 bytes of samples and has 6,300"),
        (wav(head(channels=9), (b"data", bytes(18 * 400))), "9 channels, the most are 8"),
        (wav(head(channels=0), SAMPLES), "damaged"),
        (wav(head(rate=0), SAMPLES), "damaged|0 samples a second"),
        (wav(head(rate=1), SAMPLES), "1 samples a second, not 4,000 to 192,000"),
        (wav(head(rate=2_000_000_000), SAMPLES), "2,000,000,000 samples a second"),
        (wav(head(code=0x55), SAMPLES), "not read|damaged"),
        (wav(head(code=3), SAMPLES), "damaged|not read"),
        (wav(head(), (b"data", bytes(2 * RATE * 31))), "lasts 31.0 s, the model hears 30 s"),
        (as_sound(np.array([np.nan] * 4000, np.float32), subtype="FLOAT"), "no numbers"),
        (FLAC[: len(FLAC) // 2], "damaged"),
        (MP3[: len(MP3) // 2], "damaged: it declares 16,000 samples and has"),
        (as_sound(np.zeros(RATE * 40, np.float32), form="FLAC"), "lasts 40.0 s"),
        (as_sound(np.zeros(RATE * 40, np.float32), form="MP3"), "lasts 40.0 s"),
    ],
)
def test_what_cannot_be_heard_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message) as fault:
        decode_sound(content, SETTINGS, where=PLACE)
    assert fault.value.where == PLACE


def test_a_stream_need_not_say_how_long_it_is() -> None:
    """As ffmpeg writes it into a pipe."""
    assert len(decode_sound(wav(head(), SAMPLES, size=0xFFFFFFFF), SETTINGS, where="it")) == 3200


def test_bytes_and_declared_formats_are_checked() -> None:
    content = as_sound(hiss(0.1))
    with pytest.raises(RequestError, match="bytes, the most is 100"):
        decode_sound(content, SETTINGS, where="it", limits=SoundLimits(most_bytes=100))
    with pytest.raises(RequestError, match="the request says mp3, the sound is wav"):
        decode_sound(content, SETTINGS, where="it", declared="mp3")


def test_damaged_bytes_never_raise_anything_else() -> None:
    """Every format with bytes changed: a sound, or a RequestError."""
    random = np.random.default_rng(0)
    for content in (as_sound(hiss(0.1)), as_sound(hiss(0.1), form="FLAC"), as_sound(hiss(0.2), form="MP3")):
        for _ in range(60):
            changed = bytearray(content)
            for place in [*random.integers(0, len(content), 4), *random.integers(0, 60, 2)]:
                changed[place] = int(random.integers(256))
            with contextlib.suppress(RequestError):
                assert np.isfinite(decode_sound(bytes(changed), SETTINGS, where="it")).all()


def test_equal_sounds_have_one_digest() -> None:
    first, second = (prepare_sound(tone(440, 1), SETTINGS) for _ in "12")
    assert first.digest == second.digest
    assert first.digest != prepare_sound(tone(441, 1), SETTINGS).digest


def test_settings_come_back_from_the_file_and_a_strange_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / AUDIO_CONFIG
    path.write_text(json.dumps(SETTINGS.model_dump()))
    assert AudioSettings.read(tmp_path) == SETTINGS
    for change, message in (
        ({"library": "evil.so"}, "library"),
        ({"n_fft": 10**9}, "n_fft"),
        ({"hop_length": 161}, "whole number of frames"),
        ({"chunk_length": None}, "chunk_length"),
        ({"chunk_length": 121}, "more than 120 s"),
        ({"chunk": 100}, "chunk and window go together"),
        ({"chunk": 100, "window": 250}, "not a whole number of chunks"),
        ({"chunk": 100, "window": 200, "min_length": 399}, "less than a frame"),
    ):
        rewrite_json(path, **change)
        with pytest.raises(ArtifactError, match=message):
            AudioSettings.read(tmp_path)
        path.write_text(json.dumps(SETTINGS.model_dump()))
    path.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        AudioSettings.read(tmp_path)
