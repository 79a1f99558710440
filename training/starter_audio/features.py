"""Spectrograms of the training: made once of clean speech, and disturbed anew for every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qwen_onnx.runtime.processing.audio import prepare_sound
from training.starter_audio.sounds import SETTINGS, Said, said, spoken

# decades that the features' formula divides by, and what it adds; decades below the loudest that are heard
SCALE, ADDED, RANGE = 4.0, 4.0, 8.0
# seconds of silence around what is said, frames a second
MOST_SILENCE, FRAMES = 0.7, SETTINGS.sampling_rate // SETTINGS.hop_length


@dataclass(frozen=True)
class Clean:
    """What is said, and its spectrogram: log power [bands, frames], base 10."""

    digits: tuple[int, ...]
    log_power: Tensor


@dataclass(frozen=True)
class Batch:
    """Sounds of different lengths.

    Attributes:
        mel: [sounds, bands, frames], silence behind each; frames: [sounds] of each.
        digits: of each.
    """

    mel: Tensor
    frames: Tensor
    digits: list[tuple[int, ...]]


def clean(seeds: Sequence[int], file: Path) -> list[Clean]:
    """The training's sounds; kept in ``file``."""
    if not file.exists():
        found = [_log_power(said(seed, "training")) for seed in seeds]
        ends = np.cumsum([mel.shape[1] for mel in found])
        np.savez(file, mel=np.concatenate(found, axis=1).astype(np.float16), ends=ends)
    with np.load(file) as kept:
        flat, ends = torch.from_numpy(kept["mel"]), kept["ends"].tolist()
    digits = [said(seed, "training").digits for seed in seeds]
    return [Clean(one, flat[:, begin:end]) for one, begin, end in zip(digits, [0, *ends[:-1]], ends, strict=True)]


def _log_power(one: Said) -> np.ndarray:
    sound = prepare_sound(spoken(one), SETTINGS)
    return sound.mel[:, : sound.frames] * SCALE - ADDED


def disturbed(sounds: Sequence[Clean], seed: int) -> Batch:
    """Sounds with noise, another colour, and silence around them, as if they had been recorded so."""
    chance = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=chance))

    made = []
    for one in sounds:
        log_power = one.log_power
        bands = log_power.shape[0]
        before, behind = (round(draw(0, MOST_SILENCE) * FRAMES) for _ in range(2))
        # a microphone's and a room's colour: a tilt, a wave over the bands, at times a telephone's band
        place = torch.linspace(0, 1, bands)
        tone = draw(-1.0, 1.0) * (place - 0.5)
        tone = tone + draw(0, 0.4) * torch.sin(2 * torch.pi * (draw(0.5, 2.5) * place + draw(0, 1)))
        if draw(0, 1) < 0.15:
            tone = tone - 4 * (place > draw(0.7, 0.95))
        power = torch.zeros(bands, before + log_power.shape[1] + behind)
        power[:, before : before + log_power.shape[1]] = 10 ** (log_power.float() + tone[:, None])
        # a band's noise fluctuates as the mean of some squares does
        shaped = 10 ** (draw(-1.0, 1.0) * (place - 0.5))
        level = power.mean() * 10 ** (-draw(1.0, 4.5))
        noise = torch.randn(3, *power.shape, generator=chance).square().mean(0)
        made.append(power + level * shaped[:, None] * noise)
    frames = torch.tensor([power.shape[1] for power in made])
    longest = int(frames.max()) + 2
    rows = []
    for power in made:
        gain = draw(-2.5, 0.0)
        # of what is behind a sound nothing is heard
        log = torch.full((power.shape[0], longest), -10.0)
        log[:, : power.shape[1]] = (power * 10**gain).clamp_min(1e-10).log10()
        rows.append((log.maximum(log.max() - RANGE) + ADDED) / SCALE)
    return Batch(torch.stack(rows), frames, [one.digits for one in sounds])
