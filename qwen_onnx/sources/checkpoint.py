"""Refuse a checkpoint that cannot be built before any minute is spent on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_onnx import bounded
from qwen_onnx.bounded import MOST_VALUES
from qwen_onnx.catalog.architectures import ARCHITECTURES, text_config
from qwen_onnx.errors import SourceError, UnsupportedModelError
from qwen_onnx.records import REPOSITORY
from qwen_onnx.sources.plain import require_plain
from qwen_onnx.sources.quantized import quantization_of

if TYPE_CHECKING:
    import torch

    from qwen_onnx.catalog.schema import Shape

TOKENIZER_FILE = "tokenizer.json"
# other files that an architecture has instead; sources.py converts them
TOKENIZER_FILES = {"QWenLMHeadModel": "qwen.tiktoken"}
# what may stand for it where a model gets another form anyway
SPLIT_TOKENIZER, SPLIT = ("vocab.json", "merges.txt"), {"Qwen3ASRForConditionalGeneration"}
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# how published models with a tower begin the names of their weights, and how a language model and a tower do alone
NESTED = (
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.audio_tower.", "audio_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    # as Qwen publishes Qwen3-ASR; the projection is within the tower
    ("thinker.model.", "model."),
    ("thinker.lm_head.", "lm_head."),
    ("thinker.audio_tower.proj1.", "multi_modal_projector.linear_1."),
    ("thinker.audio_tower.proj2.", "multi_modal_projector.linear_2."),
    ("thinker.audio_tower.", "audio_tower."),
)
# bare and visible: what a manifest lists
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,240}\.safetensors")
# bytes; a tokenizer of 150,000 tokens has 11 MB and some 800,000 values
LARGEST_JSON, LARGEST_INDEX, LARGEST_TOKENIZER, MOST_TOKENIZER_VALUES = 4 << 20, 64 << 20, 128 << 20, 8_000_000
# transformers never sees their config
CONVERTED = {"QWenLMHeadModel"}
# keys that make transformers load code of the checkpoint, or kernels of a hub
CODE_KEYS = {
    "auto_map",
    "custom_pipelines",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
}
REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
REQUIRED_TOO = {"QWenLMHeadModel": ("intermediate_size", "seq_length", "layer_norm_epsilon")}
# far above any Qwen, far below what would eat the memory of a machine by itself
MOST = {
    "num_hidden_layers": 1024,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 20,
    "moe_intermediate_size": 1 << 20,
    "shared_expert_intermediate_size": 1 << 20,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 1 << 13,
    "linear_num_key_heads": 1024,
    "linear_num_value_heads": 1024,
    "linear_key_head_dim": 1 << 13,
    "linear_value_head_dim": 1 << 13,
    "vocab_size": 1 << 21,
    "num_experts": 1 << 13,
    "num_local_experts": 1 << 13,
    "num_experts_per_tok": 1 << 10,
    "decoder_sparse_step": 1024,
    "full_attention_interval": 1024,
    "linear_conv_kernel_dim": 1 << 10,
    "max_position_embeddings": 1 << 26,
    "seq_length": 1 << 26,
}
MAY_BE_ZERO = {
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
}
EMBEDDINGS = ("embed_tokens.weight", "transformer.wte.weight")
# weights looked at together: of a whole embedding, what is computed would take more memory than the build
PIECE = 1 << 22

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


def check_checkpoint(
    folder: Path, architecture: str, shape: Shape, quantization: str | None = None, rope: str | None = None
) -> None:
    """Config, architecture, sizes, tokenizer, every shard whole, every weight finite; nothing of it is run.

    Args:
        quantization: how its weights are stored, as the recipe says.
        rope: how its positions are scaled, as the recipe says.

    Raises:
        UnsupportedModelError: another architecture, other sizes or otherwise stored than the recipe says, code of its
            own, no tokenizer, NaN or infinite weights.
        SourceError: a file is missing, truncated, not readable or not a plain file.
    """
    require_plain(folder)
    config = read_json(folder / "config.json")
    check_config(config, architecture, str(folder / "config.json"))
    _require_no_code(folder, architecture)
    if quantization_of(config, str(folder / "config.json")) != quantization:
        raise UnsupportedModelError(
            f"its weights are {'not ' if quantization else ''}quantised, the recipe says otherwise",
            where=str(folder / "config.json"),
            hint=f"a model of its own: qwen-onnx optimize ./{folder.name}",
        )
    faults = contradictions(config, shape, rope)
    if faults:
        raise UnsupportedModelError(
            f"the checkpoint contradicts its recipe: {'; '.join(faults)}",
            where=str(folder / "config.json"),
            hint="choose the recipe that fits (qwen-onnx list), or correct the row's shape",
        )
    tokenizer = TOKENIZER_FILES.get(architecture, TOKENIZER_FILE)
    split = architecture in SPLIT and all((folder / name).exists() for name in SPLIT_TOKENIZER)
    if not (folder / tokenizer).exists() and not split:
        raise UnsupportedModelError(
            f"the checkpoint has no {tokenizer}",
            where=str(folder),
            hint="save one beside the weights: AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
        )
    if tokenizer == TOKENIZER_FILE and (folder / tokenizer).exists():
        read_json(folder / tokenizer, most_bytes=LARGEST_TOKENIZER, most_values=MOST_TOKENIZER_VALUES)
    settings = text_config(config)
    for shard in shards(folder):
        _check_shard(shard, (settings["vocab_size"], settings["hidden_size"]))


def check_config(config: dict[str, Any], architecture: str, where: str) -> None:
    """Refuse a config that is not of ``architecture``, or that no model can have, before anything is made of it.

    Raises:
        UnsupportedModelError: all that is wrong.
    """
    named = config.get("architectures")
    found = named[0] if isinstance(named, list) and named else "none"
    if found != architecture:
        raise UnsupportedModelError(
            f"the checkpoint is a {str(found)[:100]}, the recipe builds {architecture}",
            where=where,
            hint="choose the recipe that fits: qwen-onnx list",
        )
    faults = _config_faults(config, architecture)
    if faults:
        raise UnsupportedModelError(
            f"the config cannot be right: {'; '.join(faults)}", where=where, hint="use the model's own config.json"
        )


def _config_faults(config: dict[str, Any], architecture: str) -> list[str]:
    faults, settings = [], text_config(config)
    if not isinstance(settings, dict):
        return ["text_config is not an object"]
    known = ARCHITECTURES[architecture].model_type if architecture in ARCHITECTURES else None
    if config.get("model_type") != known:
        # transformers looks for code in the folder when it does not know the type
        faults.append(f"model_type is {str(config.get('model_type'))[:100]!r}, not {known!r}")
    required = (*REQUIRED, *REQUIRED_TOO.get(architecture, ()))
    faults += [f"{name} is missing" for name in required if settings.get(name) is None]
    for name, most in MOST.items():
        value = settings.get(name)
        least = 0 if name in MAY_BE_ZERO else 1
        if value is not None and not (type(value) is int and least <= value <= most):
            faults.append(f"{name} is {str(value)[:40]}, not a number from {least} to {most:,}")
    faults += [
        f"{name} is not an object"
        for name in ("rope_parameters", "rope_scaling")
        if not isinstance(settings.get(name), dict | None)
    ]
    for name, kind in (("layer_types", str), ("mlp_only_layers", int)):
        value = settings.get(name)
        if value is not None and not (isinstance(value, list) and all(type(item) is kind for item in value)):
            faults.append(f"{name} is not a list of {'names' if kind is str else 'numbers'}")
    for name in ("rms_norm_eps", "layer_norm_epsilon"):
        if name in settings and not (isinstance(settings[name], int | float) and 0 <= settings[name] < 1):
            faults.append(f"{name} is {str(settings[name])[:40]}, not a number from 0 to 1")
    heads, groups = settings.get("num_attention_heads"), settings.get("num_key_value_heads")
    if not faults and groups and heads % groups:
        faults.append(f"num_attention_heads is {heads}, not a multiple of num_key_value_heads, {groups}")
    return faults


def _require_no_code(folder: Path, architecture: str) -> None:
    """Qwen 1.0 names code of its own: it is converted from its weights, and its config never reaches transformers."""
    if architecture in CONVERTED:
        return
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        text = bounded.read_bytes(adapter.resolve(), most_bytes=LARGEST_JSON, error=SourceError)
        raise adapter_fault(str(folder), text.decode("utf-8", errors="replace"))
    for path in sorted(folder.glob("*config.json")):
        found = sorted(CODE_KEYS & _keys_of(read_json(path)))
        if found:
            raise UnsupportedModelError(
                f"{path.name} asks for code that is not part of transformers: {', '.join(found)}",
                where=str(path),
                hint="no code of a checkpoint is run; use one without, or remove the key if you trust the rest",
            )


def adapter_fault(where: str, text: str) -> UnsupportedModelError:
    """The error for an adapter in place of a model; one name is taken from ``text``, its adapter_config.json."""
    named = re.search(rf'"base_model_name_or_path"\s*:\s*"({REPOSITORY})"', text)
    base = named[1] if named else "BASE"
    adapter = where if re.fullmatch(r"[\w./~-]+", where) and Path(where).is_dir() else "FOLDER"
    return UnsupportedModelError(
        f"an adapter is not a checkpoint{f': it belongs to {base}' if named else ''}",
        where=where,
        hint=f"merge it into its model: qwen-onnx optimize {base} --adapter {adapter}",
    )


def _keys_of(value: Any) -> set[str]:
    """Keys of an object at every level."""
    if isinstance(value, dict):
        return set(value).union(*map(_keys_of, value.values()))
    return set().union(*map(_keys_of, value)) if isinstance(value, list) else set()


def contradictions(config: dict[str, Any], shape: Shape, rope: str | None = None) -> list[str]:
    """What ``config.json`` says otherwise than the recipe; facts that either side lacks are not compared."""
    settings = text_config(config)
    known = {name: value for name, value in shape.model_dump().items() if value is not None and name in CONFIG_KEYS}
    faults = [
        f"{CONFIG_KEYS[name]} is {settings[CONFIG_KEYS[name]]}, the recipe says {value}"
        for name, value in known.items()
        if settings.get(CONFIG_KEYS[name], value) != value
    ]
    kind = rope_type(settings)
    if known and kind != (rope or "default"):
        faults.append(f"rope scaling is {kind}, the recipe is for {rope or 'the native context'}")
    return faults


def rope_type(settings: dict[str, Any]) -> str:
    """How positions are scaled: ``default`` is not at all. ``settings`` went through ``check_config``."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = str(rope.get("rope_type") or rope.get("type") or "default")[:40]
    # sections of positions for images, which text does not have
    return "default" if kind == "mrope" else kind


def read_json(path: Path, most_bytes: int = LARGEST_JSON, most_values: int = MOST_VALUES) -> dict[str, Any]:
    """A JSON object; SourceError when it is missing, damaged, or beyond the limits."""
    if not path.exists():
        raise SourceError(f"{path.name} is missing", where=str(path.parent), hint="fetch the checkpoint again")
    name, hint = f"{path.name} is damaged: it", "fetch it again"
    # links were looked at before: what is left leads to a file of the same checkpoint
    value = bounded.read_json(
        path.resolve(), most_bytes=most_bytes, most_values=most_values, error=SourceError, what=name, hint=hint
    )
    if not isinstance(value, dict):
        raise SourceError(f"{path.name} is not a JSON object", where=str(path), hint="fetch it again")
    return value


def plain_name(name: str) -> str:
    """What a weight of a published model with a tower is called where language model and tower stand apart."""
    for nested, own in NESTED:
        if name.startswith(nested):
            return own + name.removeprefix(nested)
    return name


def weight_map(folder: Path) -> dict[str, str] | None:
    """File by name of tensor, as the index of the shards says; None for a checkpoint of one file.

    Raises:
        SourceError: the index is damaged, or names what is not a visible file beside it.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        return None
    found = read_json(index, most_bytes=LARGEST_INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise SourceError(f"{INDEX_FILE} has no weight_map", where=str(index), hint="fetch it again")
    for name in found.values():
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise SourceError(
                f"{INDEX_FILE} names {str(name)[:200]!r}, which is not a safetensors file beside it",
                where=str(index),
                hint="use a checkpoint whose files lie in one folder",
            )
    return found


def shards(folder: Path) -> list[Path]:
    """The weight files of a checkpoint, whether they exist or not; raises like ``weight_map``."""
    names = weight_map(folder)
    return [folder / name for name in sorted(set(names.values()))] if names else [folder / SINGLE_FILE]


def _check_shard(shard: Path, embedding: tuple[int, int]) -> None:
    """``embedding`` is the shape [vocabulary, hidden] that the config says."""
    from safetensors import SafetensorError, safe_open

    if not shard.exists():
        raise SourceError(f"{shard.name} is missing", where=str(shard.parent), hint="fetch the checkpoint again")
    try:
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = tensors.get_tensor(name)
                if name.endswith(EMBEDDINGS) and tuple(tensor.shape) != embedding:
                    raise UnsupportedModelError(
                        f"the embedding is {list(tensor.shape)}, config.json says {list(embedding)}",
                        where=f"{shard.name}: {name}",
                        hint="use the model's own config.json",
                    )
                # eight bits have no test for it, and no infinity: they are looked at when they are dequantised
                pieces = tensor.flatten().split(PIECE)
                if tensor.dtype.itemsize > 1 and tensor.is_floating_point() and not all(map(_finite, pieces)):
                    raise UnsupportedModelError(
                        "weights hold NaN or infinity", where=f"{shard.name}: {name}", hint="use a sound checkpoint"
                    )
    except SafetensorError as error:
        raise SourceError(
            f"{shard.name} is truncated or altered: {error}", where=str(shard), hint="fetch the checkpoint again"
        ) from error


def _finite(weights: torch.Tensor) -> bool:
    return bool(weights.isfinite().all())
