"""Spoken digits: what is said follows from a seed, and espeak-ng or flite says it.

Voices, speeds and pitches of the exam are others than those of the training, and no training hears flite.
"""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile

from qwen_onnx.artifact.audio_config import AudioSettings

Samples = np.ndarray[Any, np.dtype[np.float32]]
Split = Literal["training", "exam", "flite"]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOST_DIGITS = 5
# 64 bands and 50 frames a second: half of what Qwen2-Audio has, and 12.5 tokens a second
SETTINGS = AudioSettings(feature_size=64, sampling_rate=16_000, n_fft=400, hop_length=320, chunk_length=10)
ACCENTS = {
    "training": ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029"),
    "exam": ("en-us", "en-gb", "en-gb-x-gbclan", "en-gb-x-gbcwmd"),
}
VARIANTS = {
    "training": (
        *("m1", "m2", "m4", "m5", "m6", "m7", "f1", "f2", "f4", "klatt", "klatt2", "klatt4", "Alex", "Andy", "Annie"),
        *(
            "Denis",
            "Lee",
            "Michael",
            "Mike",
            "Nguyen",
            "adam",
            "anika",
            "antonio",
            "aunty",
            "belinda",
            "caleb",
            "david",
        ),
        *(
            "edward",
            "david",
            "grandma",
            "john",
            "linda",
            "max",
            "miguel",
            "norbert",
            "pablo",
            "robert",
            "sandro",
            "shelby",
        ),
        *("steph", "victor", "zac"),
    ),
    "exam": (
        *("m3", "m8", "f3", "f5", "klatt3", "Alicia", "Andrea", "Gene", "Mario", "benjamin", "ed", "iven", "michel"),
        *("quincy", "travis", "rob"),
    ),
}
FLITE = ("slt", "rms", "awb", "kal16")
# words a minute; those of the training are even, those of the exam odd
SPEEDS = {"training": (100, 211), "exam": (91, 222)}
PITCHES = {"training": (25, 76), "exam": (15, 86)}


@dataclass(frozen=True)
class Said:
    """What is said, and how.

    Attributes:
        command: the program and its options; it writes a WAV file to the path that is appended.
    """

    seed: int
    digits: tuple[int, ...]
    split: Split
    voice: str
    command: tuple[str, ...]


def said(seed: int, split: Split) -> Said:
    """The digits of a seed, by a voice of ``split``."""
    chance = random.Random(seed)
    digits = tuple(chance.randrange(10) for _ in range(chance.randint(1, MOST_DIGITS)))
    words = chance.choice((" ", ", ")).join(DIGITS[digit] for digit in digits)
    if split == "flite":
        voice = chance.choice(FLITE)
        stretch = f"duration_stretch={chance.uniform(0.8, 1.25):.2f}"
        return Said(seed, digits, split, voice, ("flite", "-voice", voice, "--setf", stretch, "-t", words, "-o"))
    voice = f"{chance.choice(ACCENTS[split])}+{chance.choice(VARIANTS[split])}"
    speed = chance.randrange(*SPEEDS[split], 2)
    pitch, gap = chance.randrange(*PITCHES[split]), chance.choice((0, 0, 0, 2, 5))
    options = ("-v", voice, "-s", str(speed), "-p", str(pitch), "-g", str(gap))
    return Said(seed, digits, split, voice, ("espeak-ng", *options, words, "-w"))


def spoken(one: Said) -> Samples:
    """At the tower's rate, without the silence around it, loudest at 1.

    Raises:
        SystemExit: the program that says it is missing.
    """
    if shutil.which(one.command[0]) is None:
        raise SystemExit(f"{one.command[0]} is missing: apt-get install {one.command[0]}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "said.wav"
        subprocess.run([*one.command, str(path)], check=True, capture_output=True)
        samples, rate = soundfile.read(path, dtype="float32")
    heard = _at(samples, rate, SETTINGS.sampling_rate)
    loud = np.flatnonzero(np.abs(heard) > 0.01 * np.abs(heard).max())
    cut = heard[loud[0] : loud[-1] + 1]
    return np.asarray(cut / np.abs(cut).max(), dtype=np.float32)


def _at(samples: Samples, rate: int, wanted: int) -> Samples:
    """Samples at another rate, by cutting their spectrum: silence is at both ends."""
    # whole tenths of a second: the FFT of a length with a large prime is slow
    tenths = -(-len(samples) * 10 // rate)
    spectrum, size = np.fft.rfft(samples, tenths * rate // 10), tenths * wanted // 10
    return np.asarray(np.fft.irfft(spectrum[: size // 2 + 1], size) * (wanted / rate), dtype=np.float32)


def recorded(one: Said) -> Samples:
    """As a microphone may hear it: quiet or loud, with noise, silence before and behind."""
    chance = np.random.default_rng(one.seed)
    silence = [np.zeros(int(chance.uniform(0.05, 0.6) * SETTINGS.sampling_rate), np.float32) for _ in range(2)]
    speech = np.concatenate([silence[0], spoken(one), silence[1]])[: SETTINGS.samples]
    power = float(np.mean(speech**2))
    noise = chance.normal(0, (power * 10 ** (-chance.uniform(15, 40) / 10)) ** 0.5, len(speech))
    return np.asarray((speech + noise) * chance.uniform(0.05, 0.7), dtype=np.float32).clip(-1, 1)


def as_file(samples: Samples, form: str = "WAV") -> bytes:
    """A file of 16 bits."""
    file = io.BytesIO()
    soundfile.write(file, samples, SETTINGS.sampling_rate, format=form, subtype="PCM_16")
    return file.getvalue()
