"""Models that see or hear as what they are: a Qwen2, Qwen3 or Qwen3-MoE that reads text, and a tower beside it.

For text the three axes of their positions are equal, and pictures add nothing: the language model of Qwen2-VL and
Qwen2.5-VL is a Qwen2ForCausalLM, that of Qwen3-VL a Qwen3ForCausalLM or, as a mixture, a Qwen3MoeForCausalLM, down to
the names of the weights within a layer; published mixtures have their experts transposed. A Qwen3.5 reads text as it
is, and the language model of Qwen2-Audio is a Qwen2ForCausalLM anyway, that of Qwen3-ASR a Qwen3ForCausalLM.
In that form every step and every check for these takes it; the tower's weights stay in the same files under
``visual.`` or ``audio_tower.``, and its config in a file of its own.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from qwen_onnx import bounded
from qwen_onnx.catalog.architectures import HEARING, is_tied, text_config, whole_config
from qwen_onnx.errors import SourceError, UnsupportedModelError
from qwen_onnx.sources.audio_tower import QWEN2_AUDIO, AudioTower
from qwen_onnx.sources.checkpoint import INDEX_FILE, LARGEST_INDEX, SPLIT, plain_name, read_json, shards, weight_map
from qwen_onnx.sources.chunked_tower import QWEN3_ASR, ChunkedTower, hearing_tower_of
from qwen_onnx.sources.split_tokenizer import write_tokenizer
from qwen_onnx.sources.stacked import Experts, turn_data, turn_header
from qwen_onnx.sources.vision_config import (
    PREPROCESSOR,
    QWEN2_5_VL,
    QWEN2_VL,
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_VL,
    QWEN3_VL_MOE,
    Tower,
    tower_of,
)

AnyTower = Tower | AudioTower | ChunkedTower
# where transformers 5 writes how sounds are prepared, beside more
PROCESSOR = "processor_config.json"
# key of the text model's config.json: the architecture of the whole
WHOLE_ARCHITECTURE = "whole_architecture"
# architecture and model_type of the text model
TEXT = {
    QWEN2_AUDIO: ("Qwen2ForCausalLM", "qwen2"),
    QWEN3_ASR: ("Qwen3ForCausalLM", "qwen3"),
    QWEN2_VL: ("Qwen2ForCausalLM", "qwen2"),
    QWEN2_5_VL: ("Qwen2ForCausalLM", "qwen2"),
    QWEN3_VL: ("Qwen3ForCausalLM", "qwen3"),
    QWEN3_VL_MOE: ("Qwen3MoeForCausalLM", "qwen3_moe"),
}
# those that need no other form
WHOLE = (QWEN3_5, QWEN3_5_MOE)
_HINT_WHOLE = f"of a model that reads text alone take {PREPROCESSOR} away from a local copy: ./FOLDER"
# of text_config, and of the whole config of a published checkpoint, which has no text_config
KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "attention_bias",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
    "mlp_only_layers",
)
# safetensors: bytes of the header's length, and what the data behind the header are aligned to
LENGTH, ALIGNMENT = 8, 64


def write_text_form(checkpoint: Path, folder: Path) -> None:
    """Write ``checkpoint`` as a text model with a tower into the empty ``folder``.

    Weights are linked; those with the names of a Qwen3-VL or a Qwen2-Audio are copied under new ones, stacked experts
    transposed.

    Raises:
        UnsupportedModelError: weights of other names or shapes, a tower of another form, or no
            preprocessor_config.json.
        SourceError: a file is missing or damaged.
    """
    config = whole_config(read_json(checkpoint / "config.json"))
    tower = _tower(config, str(checkpoint / "config.json"))
    prepared = _preprocessor(checkpoint, tower)
    names = _names(checkpoint)
    _require_weights(names, tower, checkpoint)
    nested = tower.architecture not in WHOLE and _renamed(names) != names
    weights, experts = shards(checkpoint), _experts(config, tower, checkpoint)
    for path in weights:
        if nested or experts:
            _copied(path.resolve(), folder / path.name, experts)
        else:
            linked(path.resolve(), folder / path.name)
    other = {*(path.name for path in weights), "config.json"}
    for path in checkpoint.iterdir():
        if path.is_file() and path.name not in other and path.suffix not in {".safetensors", ".bin"}:
            shutil.copyfile(path, folder / path.name)
    if tower.architecture in SPLIT:
        write_tokenizer(checkpoint, folder)
    if nested and (folder / INDEX_FILE).exists():
        index = json.dumps({"metadata": {}, "weight_map": _renamed(names)})
        (folder / INDEX_FILE).write_text(index, encoding="utf-8")
    (folder / PREPROCESSOR).write_text(json.dumps(prepared, indent=2), encoding="utf-8")
    (folder / tower.config_name).write_text(json.dumps(config, indent=2), encoding="utf-8")
    whole = {**config, WHOLE_ARCHITECTURE: tower.architecture}
    told = whole if tower.architecture in WHOLE else text_settings(config, tower)
    (folder / "config.json").write_text(json.dumps(told, indent=2), encoding="utf-8")


def _tower(config: dict[str, Any], where: str) -> AnyTower:
    return (hearing_tower_of if config["architectures"][0] in HEARING else tower_of)(config, where)


def _preprocessor(checkpoint: Path, tower: AnyTower) -> dict[str, Any]:
    """How pictures or sounds are prepared; transformers 5 writes it of a sound into the processor's own file.

    Raises:
        UnsupportedModelError: the checkpoint does not say.
        SourceError: the file is damaged.
    """
    if (checkpoint / PREPROCESSOR).exists():
        return read_json(checkpoint / PREPROCESSOR)
    if isinstance(tower, ChunkedTower) and (checkpoint / PROCESSOR).exists():
        told = read_json(checkpoint / PROCESSOR).get("feature_extractor")
        if isinstance(told, dict):
            return told
    raise UnsupportedModelError(
        f"the checkpoint has no {PREPROCESSOR}, which says how pictures or sounds are prepared",
        where=str(checkpoint),
        hint="take it from the model that this one was made of",
    )


def text_settings(config: dict[str, Any], tower: AnyTower) -> dict[str, Any]:
    """``config.json`` of the text model, in its own terms."""
    text = text_config(config)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    found = {name: text[name] for name in KEPT if text.get(name) is not None}
    # a published Qwen2-VL has its end tokens in the whole config
    found |= {name: config[name] for name in ("bos_token_id", "eos_token_id") if config.get(name) is not None}
    architecture, model_type = TEXT[tower.architecture]
    if count := _expert_count(text):
        # Qwen3-VL's routers know no other way
        found |= {"num_experts": count, "norm_topk_prob": True}
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    return {
        **found,
        "architectures": [architecture],
        "model_type": model_type,
        "use_sliding_window": False,
        "tie_word_embeddings": bool(is_tied(config)),
        "torch_dtype": dtype or "bfloat16",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rope.get("rope_theta") or text.get("rope_theta") or 1e6,
            **tower.rope_extras(),
        },
        WHOLE_ARCHITECTURE: tower.architecture,
        **tower.text_extras(),
    }


def _expert_count(text: dict[str, Any]) -> int | None:
    """Transformers 5 writes it under another name than Qwen does."""
    return text.get("num_experts") or text.get("num_local_experts") or None


def _experts(config: dict[str, Any], tower: AnyTower, checkpoint: Path) -> Experts | None:
    """Of a mixture.

    Raises:
        UnsupportedModelError: its config lacks their sizes.
    """
    if tower.architecture != QWEN3_VL_MOE:
        return None
    text = text_config(config)
    count, inner, chosen = _expert_count(text), text.get("moe_intermediate_size"), text.get("num_experts_per_tok")
    if not (count and inner and chosen and chosen <= count):
        raise UnsupportedModelError(
            f"a mixture needs experts: there are {count}, {chosen} of them for a token, with {inner} inner dimensions",
            where=str(checkpoint / "config.json"),
            hint="use the model's own config.json",
        )
    return Experts(count, text["hidden_size"], inner)


def _names(checkpoint: Path) -> dict[str, str]:
    """File by name of tensor."""
    from safetensors import safe_open

    found = weight_map(checkpoint)
    if found is None:
        [single] = shards(checkpoint)
        with safe_open(single, framework="numpy") as file:
            found = dict.fromkeys(file.keys(), single.name)
    return found


def _renamed(names: dict[str, str]) -> dict[str, str]:
    return {plain_name(name): file for name, file in names.items()}


def _require_weights(names: dict[str, str], tower: AnyTower, checkpoint: Path) -> None:
    """Names as Qwen publishes them, and as transformers saves them."""
    plain = _renamed(names)
    wanted = ["model.embed_tokens.weight", *(f"{part}.weight" for part in tower.required)]
    missing = [name for name in wanted if name not in plain]
    if missing or len(plain) != len(names):
        raise UnsupportedModelError(
            f"the checkpoint lacks {missing[0]}" if missing else "two weights of the checkpoint have one name",
            where=str(checkpoint / INDEX_FILE),
            hint=_HINT_WHOLE
            if tower.architecture in WHOLE
            else "save it with transformers: model.save_pretrained(FOLDER)",
        )


def linked(source: Path, target: Path) -> None:
    """A hard link, or a copy where the folders are on two disks."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _copied(source: Path, target: Path, experts: Experts | None) -> None:
    """A safetensors file under other names: a header of its own before the same bytes but for stacked experts.

    Raises:
        SourceError: its header is damaged.
        UnsupportedModelError: experts of another shape.
    """
    with source.open("rb") as read, target.open("wb") as write:
        length = int.from_bytes(read.read(LENGTH), "little")
        if length > LARGEST_INDEX:
            raise SourceError("the header of the weights is damaged", where=str(source), hint="fetch it again")
        header = bounded.read_json(
            read.read(length), most_bytes=LARGEST_INDEX, error=SourceError, what=f"the header of {source.name}"
        )
        if not isinstance(header, dict):
            raise SourceError("the header of the weights is damaged", where=str(source), hint="fetch it again")
        turned = turn_header(header, experts, str(source)) if experts else []
        text = json.dumps({plain_name(name): told for name, told in header.items()}).encode()
        text += b" " * (-(LENGTH + len(text)) % ALIGNMENT)
        write.write(len(text).to_bytes(LENGTH, "little") + text)
        shutil.copyfileobj(read, write, 1 << 24)
    turn_data(target, LENGTH + len(text), turned)
