"""Refuse a checkpoint that cannot be built before any minute is spent on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_onnx.errors import SourceError, UnsupportedModelError

if TYPE_CHECKING:
    from qwen_onnx.catalog.schema import Shape

TOKENIZER_FILE = "tokenizer.json"
# other files that an architecture has instead; sources.py converts them
TOKENIZER_FILES = {"QWenLMHeadModel": "qwen.tiktoken"}
INDEX_FILE = "model.safetensors.index.json"

# names in config.json of what a recipe's shape says
CONFIG_KEYS = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "tied": "tie_word_embeddings",
    "experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
}


def check_checkpoint(folder: Path, architecture: str, shape: Shape) -> None:
    """Config, architecture, sizes, tokenizer, every shard whole, every weight finite.

    Raises:
        UnsupportedModelError: another architecture or other sizes than the recipe's, no tokenizer, NaN or infinite
            weights.
        SourceError: a file is missing, truncated or not readable.
    """
    config = read_json(folder / "config.json")
    found = (config.get("architectures") or ["none"])[0]
    if found != architecture:
        raise UnsupportedModelError(
            f"the checkpoint is a {found}, the recipe builds {architecture}",
            where=str(folder / "config.json"),
            hint="choose the recipe that fits: qwen-onnx list",
        )
    faults = contradictions(config, shape)
    if faults:
        raise UnsupportedModelError(
            f"the checkpoint contradicts its recipe: {'; '.join(faults)}",
            where=str(folder / "config.json"),
            hint="choose the recipe that fits (qwen-onnx list), or correct the row's shape",
        )
    tokenizer = TOKENIZER_FILES.get(architecture, TOKENIZER_FILE)
    if not (folder / tokenizer).exists():
        raise UnsupportedModelError(
            f"the checkpoint has no {tokenizer}",
            where=str(folder),
            hint="save one beside the weights: AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
        )
    if tokenizer == TOKENIZER_FILE:
        read_json(folder / tokenizer)
    for shard in shards(folder):
        _check_shard(shard)


def contradictions(config: dict[str, Any], shape: Shape) -> list[str]:
    """What ``config.json`` says otherwise than the recipe; facts that either side lacks are not compared."""
    settings = config.get("text_config") or config
    known = {name: value for name, value in shape.model_dump().items() if value is not None and name in CONFIG_KEYS}
    faults = [
        f"{CONFIG_KEYS[name]} is {settings[CONFIG_KEYS[name]]}, the recipe says {value}"
        for name, value in known.items()
        if settings.get(CONFIG_KEYS[name], value) != value
    ]
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if known and kind != "default":
        faults.append(f"rope scaling is {kind}, the recipe is for the native context")
    return faults


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; SourceError when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(
            f"{path.name} is missing", where=str(path.parent), hint="fetch the checkpoint again"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path.name} is damaged: {error}", where=str(path), hint="fetch it again") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path.name} is not a JSON object", where=str(path), hint="fetch it again")
    return value


def shards(folder: Path) -> list[Path]:
    """The weight files of a checkpoint, whether they exist or not."""
    index = folder / INDEX_FILE
    if index.exists():
        weight_map = read_json(index).get("weight_map", {})
        return [folder / name for name in sorted(set(weight_map.values()))]
    return [folder / "model.safetensors"]


def _check_shard(shard: Path) -> None:
    import torch
    from safetensors import SafetensorError, safe_open

    if not shard.exists():
        raise SourceError(f"{shard.name} is missing", where=str(shard.parent), hint="fetch the checkpoint again")
    try:
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise UnsupportedModelError(
                        "weights hold NaN or infinity", where=f"{shard.name}: {name}", hint="use a sound checkpoint"
                    )
    except SafetensorError as error:
        raise SourceError(
            f"{shard.name} is truncated or altered: {error}", where=str(shard), hint="fetch the checkpoint again"
        ) from error
