"""Qwen2-VL and Qwen2.5-VL as what they are: a Qwen2 that reads text, and a vision tower beside it.

For text the three axes of their positions are equal, so their language model is a Qwen2ForCausalLM down to the names
of its weights. In that form every step and every check for Qwen2 takes it; the tower's weights stay in the same files
under ``visual.``, and its config in ``vision_config.json``.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from qwen_onnx.errors import UnsupportedModelError
from qwen_onnx.sources.checkpoint import INDEX_FILE, read_json, shards, weight_map
from qwen_onnx.sources.vision_config import PREPROCESSOR, VISION_ARCHITECTURE, VISION_CONFIG, tower_of

TEXT = "Qwen2ForCausalLM"
# of text_config, and of the whole config of a published checkpoint, which has no text_config
KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
NEEDED = ("patch_embed.proj.weight", "merger.mlp.0.weight", "merger.mlp.2.weight", "blocks.0.attn.qkv.weight")


def write_text_form(checkpoint: Path, folder: Path) -> None:
    """Write ``checkpoint`` as a Qwen2ForCausalLM with a tower into the empty ``folder``; weights are linked.

    Raises:
        UnsupportedModelError: weights of other names, a tower of another form, or no preprocessor_config.json.
        SourceError: a file is missing or damaged.
    """
    config = read_json(checkpoint / "config.json")
    tower_of(config, str(checkpoint / "config.json"))
    if not (checkpoint / PREPROCESSOR).exists():
        raise UnsupportedModelError(
            f"the checkpoint has no {PREPROCESSOR}, which says how pictures are prepared",
            where=str(checkpoint),
            hint="take it from the model that this one was made of",
        )
    _require_weights(checkpoint)
    weights = shards(checkpoint)
    for path in weights:
        _linked(path.resolve(), folder / path.name)
    other = {*(path.name for path in weights), "config.json"}
    for path in checkpoint.iterdir():
        if path.is_file() and path.name not in other and path.suffix not in {".safetensors", ".bin"}:
            shutil.copyfile(path, folder / path.name)
    (folder / VISION_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(text_settings(config), indent=2), encoding="utf-8")


def text_settings(config: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of the text model, in Qwen2's terms."""
    text = config.get("text_config") or config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    found = {name: text[name] for name in KEPT if text.get(name) is not None}
    # a published checkpoint has its end tokens in the whole config
    found |= {name: config[name] for name in ("bos_token_id", "eos_token_id") if config.get(name) is not None}
    return {
        **found,
        "architectures": [TEXT],
        "model_type": "qwen2",
        "use_sliding_window": False,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "torch_dtype": config.get("dtype") or config.get("torch_dtype") or "bfloat16",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rope.get("rope_theta") or text.get("rope_theta") or 1e6,
            "mrope_section": rope["mrope_section"],
        },
        VISION_ARCHITECTURE: config["architectures"][0],
    }


def _require_weights(checkpoint: Path) -> None:
    """Names as Qwen publishes them, and as transformers saves them."""
    from safetensors import safe_open

    names = weight_map(checkpoint)
    if names is None:
        [single] = shards(checkpoint)
        with safe_open(single, framework="pt") as file:
            names = dict.fromkeys(file.keys(), single.name)
    wanted = ["model.embed_tokens.weight", *(f"visual.{name}" for name in NEEDED)]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise UnsupportedModelError(
            f"the checkpoint lacks {missing[0]}",
            where=str(checkpoint / INDEX_FILE),
            hint="save it with transformers: model.save_pretrained(FOLDER)",
        )


def _linked(source: Path, target: Path) -> None:
    """A hard link, or a copy where the folders are on two disks."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
