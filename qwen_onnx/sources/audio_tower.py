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
# as transformers writes them where a config has the names of other models
ALIASES = {
    "encoder_attention_heads": "num_attention_heads",
    "encoder_layers": "num_hidden_layers",
    "encoder_ffn_dim": "intermediate_size",
    "d_model": "hidden_size",
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
# what both kinds of tower have in one way alone
ALIKE: dict[str, Any] = {"activation_function": "gelu", "scale_embedding": False}
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
    told = read_tower(config, USUAL, ALIKE)
    told.require(where)
    numbers = told.numbers
    return AudioTower(
        architecture=config["architectures"][0],
        bands=numbers["num_mel_bins"],
        depth=numbers["encoder_layers"],
        heads=numbers["encoder_attention_heads"],
        inner=numbers["encoder_ffn_dim"],
        width=numbers["d_model"],
        positions=numbers["max_source_positions"],
        output=text_config(config)["hidden_size"],
        token=told.token,
    )


@dataclass(frozen=True)
class ToldTower:
    """What a config says of an audio tower.

    Attributes:
        numbers: by name; token: that stands for a part of a sound; faults: of all that cannot be right.
    """

    numbers: dict[str, int]
    token: int
    faults: list[str]

    def require(self, where: str) -> None:
        """UnsupportedModelError for all faults."""
        if self.faults:
            raise UnsupportedModelError(
                f"the audio tower cannot be right: {'; '.join(self.faults)}",
                where=where,
                hint="use the model's own config.json",
            )


def read_tower(config: dict[str, Any], usual: dict[str, tuple[int, int]], fixed: dict[str, Any]) -> ToldTower:
    """Bounded numbers and the token of ``config``, of the whole checkpoint.

    Args:
        usual: by name, what the published towers have, and the most; fixed: what a tower has in one way alone.
    """
    faults: list[str] = []
    told, text = config.get("audio_config"), text_config(config)
    audio = told if isinstance(told, dict) else {}
    if not audio:
        faults.append("audio_config is missing")
    numbers: dict[str, Any] = {
        name: audio.get(name, audio.get(ALIASES.get(name, name), at)) for name, (at, _) in usual.items()
    }
    for name, value in numbers.items():
        if not (type(value) is int and 1 <= value <= usual[name][1]):
            faults.append(f"audio_config.{name} is {str(value)[:40]}, not a number from 1 to {usual[name][1]:,}")
            numbers[name] = 1
    width, heads = numbers["d_model"], numbers["encoder_attention_heads"]
    if width % heads:
        faults.append(f"audio_config: {width} dimensions do not divide into {heads} heads")
    faults += [
        f"audio_config.{name} is {str(audio[name])[:40]}, not {value}"
        for name, value in fixed.items()
        if audio.get(name, value) != value
    ]
    # two names of one number: transformers 5 writes the other
    token = config.get("audio_token_index", config.get("audio_token_id"))
    if not (type(token) is int and 0 <= token < text.get("vocab_size", 0)):
        faults.append(f"audio_token_index is {str(token)[:40]}, not a token of the vocabulary")
        token = 0
    return ToldTower(numbers, token, faults)


def audio_settings_of(folder: Path, tower: AudioTower) -> AudioSettings:
    """How sounds are prepared, as the ``preprocessor_config.json`` of a checkpoint says.

    Raises:
        UnsupportedModelError: it says what the tower cannot use, or asks for another front end.
        SourceError: it is missing or damaged.
    """
    settings, faults = read_settings(folder, PREPARED, tower.bands)
    if settings and settings.frames != STRIDE * tower.positions:
        faults.append(f"it makes {settings.frames} frames, the tower has places for {STRIDE * tower.positions}")
    return settled(settings, faults, folder)


def read_settings(
    folder: Path, usual: dict[str, int], bands: int, **own: int
) -> tuple[AudioSettings | None, list[str]]:
    """What ``preprocessor_config.json`` says, and what of it cannot be right.

    Args:
        usual: what the published files say; bands: that the tower has; own: what they do not say.
    """
    told, faults = read_json(folder / PREPROCESSOR), []
    faults += [
        f"{name} is {str(told[name])[:40]}, not {value}"
        for name, value in FIXED.items()
        if told.get(name, value) != value
    ]
    settings: AudioSettings | None = None
    try:
        settings = AudioSettings.model_validate({name: told.get(name, at) for name, at in usual.items()} | own)
    except ValidationError as error:
        faults += [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
    if settings and settings.feature_size != bands:
        faults.append(f"feature_size is {settings.feature_size}, the tower has {bands}")
    return settings, faults


def settled(settings: AudioSettings | None, faults: list[str], folder: Path) -> AudioSettings:
    """``settings``; UnsupportedModelError for all faults."""
    if faults or settings is None:
        raise UnsupportedModelError(
            f"the preparation of sounds cannot be right: {'; '.join(faults)}",
            where=str(folder / PREPROCESSOR),
            hint="use the model's own file",
        )
    return settings
