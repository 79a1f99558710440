"""What ``config.json`` and ``preprocessor_config.json`` say of an audio tower, bounded before it is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qwen_onnx.artifact.audio_config import AudioSettings
from qwen_onnx.catalog.architectures import text_config
from qwen_onnx.errors import UnsupportedModelError
from qwen_onnx.sources.checkpoint import read_json
from qwen_onnx.sources.vision_config import PREPROCESSOR

AUDIO_TOWER_CONFIG = "audio_tower_config.json"
QWEN2_AUDIO = "Qwen2AudioForConditionalGeneration"
# what the published towers have, and the most of it
USUAL = {
    "num_mel_bins": (128, 512),
    "encoder_layers": (32, 256),
    "encoder_attention_heads": (20, 256),
    "encoder_ffn_dim": (5120, 1 << 18),
    "d_model": (1280, 1 << 16),
    "max_source_positions": (1500, 1 << 14),
}
# how spectrograms are made; anything else is another front end
PREPARED = {
    "feature_size": 128,
    "sampling_rate": 16_000,
    "n_fft": 400,
    "hop_length": 160,
    "chunk_length": 30,
}
FIXED = {"padding_value": 0, "dither": 0, "do_normalize": False, "padding_side": "right"}
# frames that the second convolution makes one of
STRIDE = 2


@dataclass(frozen=True)
class AudioTower:
    """The form of an audio tower, which is Whisper's encoder, an average of two steps, and a projection.

    Attributes:
        architecture: of the whole model.
        bands: of a spectrogram.
        positions: steps of the longest sound, of two frames each.
        output: dimensions of the text model.
        token: id that stands for a part of a sound in a prompt.
    """

    architecture: str
    bands: int
    depth: int
    heads: int
    inner: int
    width: int
    positions: int
    output: int
    token: int

    config_name = AUDIO_TOWER_CONFIG
    required = ("audio_tower.conv1", "audio_tower.layers.0.fc1", "multi_modal_projector.linear")

    def text_extras(self) -> dict[str, Any]:
        """What the text model's config says besides: its positions are those of text."""
        return {}

    def rope_extras(self) -> dict[str, Any]:
        """Nor has its RoPE sections."""
        return {}


def audio_tower_of(config: dict[str, Any], where: str) -> AudioTower:
    """The tower that ``config``, of the whole checkpoint, describes.

    Raises:
        UnsupportedModelError: all that is missing or cannot be right.
    """
    faults: list[str] = []
    told, text = config.get("audio_config"), text_config(config)
    audio = told if isinstance(told, dict) else {}
    if not audio:
        faults.append("audio_config is missing")
    numbers = {name: audio.get(name, usual) for name, (usual, _) in USUAL.items()}
    for name, value in numbers.items():
        if not (type(value) is int and 1 <= value <= USUAL[name][1]):
            faults.append(f"audio_config.{name} is {str(value)[:40]}, not a number from 1 to {USUAL[name][1]:,}")
            numbers[name] = 1
    width, heads = numbers["d_model"], numbers["encoder_attention_heads"]
    if width % heads:
        faults.append(f"audio_config: {width} dimensions do not divide into {heads} heads")
    for name, usual in (("activation_function", "gelu"), ("scale_embedding", False)):
        if audio.get(name, usual) != usual:
            faults.append(f"audio_config.{name} is {str(audio[name])[:40]}, not {usual}")
    # two names of one number: transformers 5 writes the other
    token = config.get("audio_token_index", config.get("audio_token_id"))
    if not (type(token) is int and 0 <= token < text.get("vocab_size", 0)):
        faults.append(f"audio_token_index is {str(token)[:40]}, not a token of the vocabulary")
        token = 0
    if faults:
        raise UnsupportedModelError(
            f"the audio tower cannot be right: {'; '.join(faults)}",
            where=where,
            hint="use the model's own config.json",
        )
    return AudioTower(
        architecture=config["architectures"][0],
        bands=numbers["num_mel_bins"],
        depth=numbers["encoder_layers"],
        heads=heads,
        inner=numbers["encoder_ffn_dim"],
        width=width,
        positions=numbers["max_source_positions"],
        output=text["hidden_size"],
        token=token,
    )


def audio_settings_of(folder: Path, tower: AudioTower) -> AudioSettings:
    """How sounds are prepared, as the ``preprocessor_config.json`` of a checkpoint says.

    Raises:
        UnsupportedModelError: it says what the tower cannot use, or asks for another front end.
        SourceError: it is missing or damaged.
    """
    told, faults = read_json(folder / PREPROCESSOR), []
    faults += [
        f"{name} is {str(told[name])[:40]}, not {usual}"
        for name, usual in FIXED.items()
        if told.get(name, usual) != usual
    ]
    settings: AudioSettings | None = None
    try:
        settings = AudioSettings.model_validate({name: told.get(name, usual) for name, usual in PREPARED.items()})
    except ValidationError as error:
        faults += [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
    if settings and settings.feature_size != tower.bands:
        faults.append(f"feature_size is {settings.feature_size}, the tower has {tower.bands}")
    if settings and settings.frames != STRIDE * tower.positions:
        faults.append(f"it makes {settings.frames} frames, the tower has places for {STRIDE * tower.positions}")
    if faults or settings is None:
        raise UnsupportedModelError(
            f"the preparation of sounds cannot be right: {'; '.join(faults)}",
            where=str(folder / PREPROCESSOR),
            hint="use the model's own file",
        )
    return settings
