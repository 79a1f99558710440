"""The audio tower of Qwen3-ASR: what its configs say, bounded before it is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_onnx.artifact.audio_config import REDUCED, AudioSettings
from qwen_onnx.catalog.architectures import text_config, whole_config
from qwen_onnx.sources.audio_tower import (
    ALIKE,
    AUDIO_TOWER_CONFIG,
    PREPARED,
    AudioTower,
    audio_settings_of,
    audio_tower_of,
    read_settings,
    read_tower,
    settled,
)

QWEN3_ASR = "Qwen3ASRForConditionalGeneration"
# what the published towers have, and the most of it
USUAL = {
    "num_mel_bins": (128, 512),
    "encoder_layers": (24, 256),
    "encoder_attention_heads": (16, 256),
    "encoder_ffn_dim": (4096, 1 << 18),
    "d_model": (1024, 1 << 16),
    "downsample_hidden_size": (480, 1 << 12),
    "n_window_infer": (800, 1 << 14),
    "output_dim": (3584, 1 << 16),
}
# frames of half a chunk: transformers counts its thirteen tokens by a constant
HALF = 50
# seconds that Qwen's own library gives to the model at once, and the samples that it fills a shorter sound up to
LONGEST, SHORTEST = 1200, 8000
# how transformers fills the spectrogram of a short sound up; chunk_length is no bound of it
KNOWN = {name: usual for name, usual in PREPARED.items() if name != "chunk_length"} | {"min_length": SHORTEST}


@dataclass(frozen=True)
class ChunkedTower:
    """The form of an audio tower that convolves chunks of a sound and hears within windows of them.

    Attributes:
        architecture: of the whole model.
        bands: of a spectrogram.
        channels: of its three convolutions in two dimensions.
        window: frames within which tokens hear each other.
        output: dimensions of the text model.
        token: id that stands for a part of a sound in a prompt.
    """

    architecture: str
    bands: int
    channels: int
    depth: int
    heads: int
    inner: int
    width: int
    window: int
    output: int
    token: int

    config_name = AUDIO_TOWER_CONFIG
    required = ("audio_tower.conv2d1", "audio_tower.layers.0.fc1", "multi_modal_projector.linear_1")
    chunk = 2 * HALF

    @property
    def places(self) -> int:
        """Tokens of a whole chunk."""
        return -(-self.chunk // REDUCED)

    @property
    def heights(self) -> int:
        """Rows that the convolutions leave of the bands."""
        return -(-self.bands // REDUCED)

    def text_extras(self) -> dict[str, Any]:
        """What the text model's config says besides: its positions are those of text."""
        return {}

    def rope_extras(self) -> dict[str, Any]:
        """Nor has its RoPE sections: those of the published one turn all three axes alike."""
        return {}


def chunked_tower_of(config: dict[str, Any], where: str) -> ChunkedTower:
    """The tower that ``config``, of the whole checkpoint, describes.

    Raises:
        UnsupportedModelError: all that is missing or cannot be right.
    """
    config = whole_config(config)
    told = read_tower(config, USUAL, ALIKE | {"n_window": HALF, "max_position_embeddings": -(-2 * HALF // REDUCED)})
    numbers, hidden = told.numbers, text_config(config).get("hidden_size")
    if numbers["n_window_infer"] % (2 * HALF):
        told.faults.append(f"audio_config.n_window_infer is {numbers['n_window_infer']}, no multiple of {2 * HALF}")
    if numbers["d_model"] % 2 or numbers["d_model"] < 2 * REDUCED:
        told.faults.append(f"audio_config.d_model is {numbers['d_model']}, which positions do not divide")
    if numbers["output_dim"] != hidden:
        told.faults.append(f"audio_config.output_dim is {numbers['output_dim']}, the text model has {hidden}")
    told.require(where)
    return ChunkedTower(
        architecture=config["architectures"][0],
        bands=numbers["num_mel_bins"],
        channels=numbers["downsample_hidden_size"],
        depth=numbers["encoder_layers"],
        heads=numbers["encoder_attention_heads"],
        inner=numbers["encoder_ffn_dim"],
        width=numbers["d_model"],
        window=numbers["n_window_infer"],
        output=numbers["output_dim"],
        token=told.token,
    )


def hearing_tower_of(config: dict[str, Any], where: str) -> AudioTower | ChunkedTower:
    """Of a model that hears, by its architecture. Raises UnsupportedModelError like ``audio_tower_of``."""
    return (chunked_tower_of if config["architectures"][0] == QWEN3_ASR else audio_tower_of)(config, where)


def hearing_settings_of(folder: Path, tower: AudioTower | ChunkedTower) -> AudioSettings:
    """How sounds are prepared for ``tower``. Raises like ``audio_settings_of``."""
    if isinstance(tower, AudioTower):
        return audio_settings_of(folder, tower)
    own = {"chunk_length": LONGEST, "chunk": tower.chunk, "window": tower.window}
    return settled(*read_settings(folder, KNOWN, tower.bands, **own), folder)
