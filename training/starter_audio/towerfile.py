"""The file that the repository carries: the tower in half precision, its header for ``joined.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from qwen_onnx.files import sha256_of
from qwen_onnx.sources.joined import TOLD, Hears
from training.starter_audio.language import SHOWN
from training.starter_audio.sounds import SETTINGS
from training.starter_audio.tower import AudioTower, audio_config, weights

# a special token that the starter has and never uses; the batch engine tries itself out with the ids 1 to 9
AUDIO, MARK = 14, "<|AUDIO|>"


def told() -> Hears:
    """What the header says."""
    return Hears(
        tokens={MARK: AUDIO},
        ids={"audio_token_index": AUDIO},
        audio_config=audio_config(),
        preprocessor={
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": SETTINGS.feature_size,
            "sampling_rate": SETTINGS.sampling_rate,
            "n_fft": SETTINGS.n_fft,
            "hop_length": SETTINGS.hop_length,
            "chunk_length": SETTINGS.chunk_length,
            "n_samples": SETTINGS.samples,
            "nb_max_frames": SETTINGS.frames,
            "padding_value": 0.0,
            "padding_side": "right",
            "return_attention_mask": True,
        },
        shown=MARK.join(SHOWN),
    )


def write_tower(tower: AudioTower, projector: nn.Linear, path: Path) -> dict[str, Any]:
    """Write ``tower`` and its ``projector``; the file's size and SHA-256, which the recipe names."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights(tower, projector), path, metadata={TOLD: json.dumps(told().model_dump(mode="json"))})
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
