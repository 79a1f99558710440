"""The file that the repository carries: tower and LoRA in half precision, its header for ``joined.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from qwen_onnx.files import sha256_of
from qwen_onnx.sources.joined import TOLD, Sees
from training.starter_vl.language import IMAGE, SECTIONS, VIDEO, VISION_END, VISION_START
from training.starter_vl.lora import RANK, adapter_weights
from training.starter_vl.pixels import LEAST, MIDDLE, MOST
from training.starter_vl.tower import FRAMES, MERGE, PATCH, VisionTower, vision_config, weights


def told() -> Sees:
    """What the header says."""
    time, down, across = SECTIONS
    return Sees(
        mrope_section=(time, down, across),
        rank=RANK,
        tokens={
            "<|vision_start|>": VISION_START,
            "<|image_pad|>": IMAGE,
            "<|vision_end|>": VISION_END,
            "<|video_pad|>": VIDEO,
        },
        ids={
            "vision_start_token_id": VISION_START,
            "image_token_id": IMAGE,
            "vision_end_token_id": VISION_END,
            "video_token_id": VIDEO,
        },
        vision_config=vision_config(),
        preprocessor={
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": LEAST,
            "max_pixels": MOST,
            "patch_size": PATCH,
            "temporal_patch_size": FRAMES,
            "merge_size": MERGE,
            "image_mean": list(MIDDLE),
            "image_std": list(MIDDLE),
        },
    )


def write_tower(tower: VisionTower, learned: nn.ModuleDict, path: Path) -> dict[str, Any]:
    """Write ``tower`` and what the language model ``learned``; the file's size and SHA-256, which the recipe names."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        weights(tower) | adapter_weights(learned), path, metadata={TOLD: json.dumps(told().model_dump(mode="json"))}
    )
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
