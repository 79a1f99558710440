"""Checks of an artifact that hears: its encoder, its preparation of sounds, and what they do to its answers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from qwen_onnx.artifact.audio_config import TRANSCRIBES, AudioSettings
from qwen_onnx.catalog.schema import Verification
from qwen_onnx.records import Verdict
from qwen_onnx.runtime.engines.batch.sight import Hearing
from qwen_onnx.runtime.engines.media import Sound
from qwen_onnx.runtime.processing.transcripts import prefill
from qwen_onnx.sources.checkpoint import read_json
from qwen_onnx.sources.vision_config import PREPROCESSOR
from qwen_onnx.verify import drawn, senses
from qwen_onnx.verify.checks import check
from qwen_onnx.verify.context import Context
from qwen_onnx.verify.records import CheckResult
from qwen_onnx.verify.results import certain
from qwen_onnx.verify.statistics import at_most

# made of artifacts that hear alone
AUDIBLE = frozenset({"spectrogram", "audio", "hearing_parity", "hearing"})
RUN = frozenset({Verification.RUN})
# transformers rounds its FFT to float32, ours does not
SPECTRUM_DIFF = 3e-4
SEVERAL = "several"
# how a model that transcribes begins an answer
SPOKEN = prefill("English")
WORDS = "There are several sounds. The first is lower than the second, and what follows is a noise that fades."


def hears(artifact: Path) -> bool:
    """Whether an artifact has an encoder of sounds."""
    model = senses.model_of(artifact)
    return model is not None and model.speech is not None


def _prepared(artifact: Path) -> dict[str, Sound]:
    from qwen_onnx.runtime.processing.audio import prepare_sound

    settings = AudioSettings.read(artifact)
    return {kind: prepare_sound(samples, settings) for kind, samples in _drawn(settings).items()}


def _drawn(settings: AudioSettings) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """By kind; one of several windows for an encoder that has them, its last chunk incomplete."""
    sounds = drawn.sounds()
    if settings.window is not None:
        count = (5 * settings.window // 2 + 37) * settings.hop_length
        sounds["long"] = np.resize(np.concatenate(list(sounds.values())), count)
    return sounds


def _extracted(told: dict[str, Any], samples: np.ndarray[Any, Any], settings: AudioSettings) -> tuple[Any, int]:
    """A spectrogram by transformers with the settings ``told``, and how many frames of it are of the sound."""
    from transformers import Qwen3ASRFeatureExtractor, WhisperFeatureExtractor

    given = {name: told[name] for name in told if not name.endswith("_type")}
    kind, filled = (WhisperFeatureExtractor, "max_length")
    if settings.chunk is not None:
        kind, filled = (Qwen3ASRFeatureExtractor, "longest")
    found = kind(**given)(
        samples, sampling_rate=drawn.RATE, padding=filled, return_attention_mask=True, return_tensors="np"
    )
    return np.asarray(found["input_features"])[0], int(found["attention_mask"].sum())


@check("spectrogram", RUN)
def spectrogram_parity(context: Context) -> CheckResult:
    """Spectrograms and numbers of frames are those of transformers with the checkpoint's own settings."""
    told, settings = read_json(context.checkpoint / PREPROCESSOR), AudioSettings.read(context.artifact)
    worst_diff, lengths, sounds = 0.0, 0, _drawn(settings)
    for kind, sound in _prepared(context.artifact).items():
        wanted, frames = _extracted(told, sounds[kind], settings)
        given = wanted[:, : sound.mel.shape[1]]
        if frames != sound.frames or given.shape != sound.mel.shape:
            lengths += 1
            continue
        worst_diff = max(worst_diff, float(np.abs(given - sound.mel).max()))
    return CheckResult(
        name="spectrogram",
        verdict=Verdict.FAIL if lengths else at_most(certain(worst_diff), SPECTRUM_DIFF),
        measured={"sounds": len(sounds), "max_diff": worst_diff, "other_lengths": lengths},
        limit={"max_diff": SPECTRUM_DIFF, "other_lengths": 0},
    )


@check("audio", RUN)
def encoder_parity(context: Context) -> CheckResult:
    """The encoder gives the features that PyTorch's tower and projection give in fp32."""
    return senses.encoder_parity(context, "audio", Hearing, list(_prepared(context.artifact).values()))


@check("hearing_parity", RUN)
def graph_parity_with_sounds(context: Context) -> CheckResult:
    """With a sound's features the graph computes what PyTorch computes with the same matrices, both in fp32."""
    return senses.graph_parity(context, "hearing_parity", _prompts(context)[SEVERAL])


@check("hearing", RUN)
def drift_with_sounds(context: Context) -> CheckResult:
    """Teacher-forced on conversations with sounds, the artifact predicts what PyTorch predicts."""
    return senses.drift(context, "hearing", _prompts(context))


def _prompts(context: Context) -> dict[str, senses.Asked]:
    """By kind of sound: a conversation about it, the last about two of them."""
    import soundfile

    def made() -> dict[str, senses.Asked]:
        files = {}
        for kind, samples in drawn.sounds().items():
            file = io.BytesIO()
            soundfile.write(file, samples, drawn.RATE, format="WAV", subtype="FLOAT")
            files[kind] = file.getvalue()
        turns = {**{kind: [kind] for kind in files}, SEVERAL: list(files)[:2]}
        model = senses.model_of(context.artifact)
        words = f"{SPOKEN}{WORDS}" if model is not None and model.type == TRANSCRIBES else WORDS
        return senses.asked_of(context, turns, files, words)

    return context.once("sounds", made)
