"""Qwen 1.0 (QWenLMHeadModel) → Qwen2ForCausalLM, without running the checkpoint's code.

The published equations (Qwen technical report, arXiv:2309.16609, and the model's config) are those of Qwen2 up to
names: c_attn holds q, k and v with biases; ``c_proj(w1(x) · silu(w2(x)))`` makes w2 the gate and w1 the up projection;
``intermediate_size`` counts both. Dynamic NTK scaling and log-n attention act beyond ``seq_length`` only, so the
artifact is limited to it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_onnx.errors import UnsupportedModelError
from qwen_onnx.files import licence_files
from qwen_onnx.sources.checkpoint import INDEX_FILE, read_json, shards
from qwen_onnx.sources.tiktoken import END_OF_TEXT, IM_END, TIKTOKEN_FILE, write_tokenizer, write_tokenizer_config

if TYPE_CHECKING:
    import torch

ARCHITECTURE = "QWenLMHeadModel"
NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "ln_1.weight": "input_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "mlp.w1.weight": "mlp.up_proj.weight",
    "mlp.w2.weight": "mlp.gate_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}
FUSED = "attn.c_attn."
# buffers that follow from the config
BUFFERS = ("rotary_emb.inv_freq", "attn.rotary_emb.inv_freq", "attn.masked_bias", "attn.bias", "attn.logn_tensor")
SAMPLING = ("do_sample", "top_k", "top_p", "temperature", "repetition_penalty", "max_new_tokens")
# the format in which the chat models were tuned (chat_format: chatml), with the default system message published
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_qwen2_form(checkpoint: Path, folder: Path) -> None:
    """Write ``checkpoint`` as a Qwen2ForCausalLM into the empty ``folder``, one shard in memory at a time.

    Raises:
        UnsupportedModelError: a config or a tensor that the equations above do not cover.
        SourceError: a file is missing or damaged.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = read_json(checkpoint / "config.json")
    settings = qwen2_settings(config)
    special = write_tokenizer(checkpoint / TIKTOKEN_FILE, folder)
    weight_map: dict[str, str] = {}
    for shard in shards(checkpoint):
        renamed: dict[str, torch.Tensor] = {}
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                renamed |= qwen2_tensors(name, tensors.get_tensor(name))
        save_file(renamed, folder / shard.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(renamed, shard.name)
    _require_all(weight_map, settings["num_hidden_layers"])
    if len(set(weight_map.values())) > 1:
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    generation = _generation(checkpoint)
    chats = generation.get("chat_format") == "chatml"
    end = [special[IM_END], special[END_OF_TEXT]] if chats else special[END_OF_TEXT]
    tokens = {"eos_token_id": end, "pad_token_id": special[END_OF_TEXT]}
    kept = {name: value for name, value in generation.items() if name in SAMPLING}
    (folder / "config.json").write_text(json.dumps(settings | tokens, indent=2), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(kept | tokens, indent=2), encoding="utf-8")
    write_tokenizer_config(folder, CHATML if chats else None)
    for path in licence_files(checkpoint):
        shutil.copyfile(path, folder / path.name)


def _require_all(names: Iterable[str], layers: int) -> None:
    """transformers fills a missing weight with random numbers and only warns."""
    attention = [f"self_attn.{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")]
    wanted = {f"model.layers.{i}.{name}" for i in range(layers) for name in (*LAYER_NAMES.values(), *attention)}
    missing = sorted({*wanted, *NAMES.values()} - set(names))
    if missing:
        raise UnsupportedModelError(
            f"the checkpoint lacks {len(missing)} weights, in Qwen2's terms {missing[0]}",
            where="safetensors",
            hint="fetch the checkpoint again",
        )


def _generation(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "generation_config.json"
    return read_json(path) if path.exists() else {}


def qwen2_settings(config: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` in Qwen2's terms.

    Raises:
        UnsupportedModelError: a variant that Qwen2 has no term for, or quantised weights.
    """
    heads = config["num_attention_heads"]
    asked = {
        "rotary_pct": (config.get("rotary_pct", 1.0), 1.0),
        "no_bias": (config.get("no_bias", True), True),
        "kv_channels": (config.get("kv_channels", config["hidden_size"] // heads) * heads, config["hidden_size"]),
        "scale_attn_weights": (config.get("scale_attn_weights", True), True),
    }
    wrong = [name for name, (found, wanted) in asked.items() if found != wanted]
    if wrong:
        raise UnsupportedModelError(
            f"this Qwen 1.0 has another form than the published ones: {', '.join(wrong)}",
            where="config.json",
            hint="use an unquantised checkpoint of Qwen 1.0",
        )
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"] // 2,
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_act": "silu",
        "max_position_embeddings": config["seq_length"],
        "rms_norm_eps": config["layer_norm_epsilon"],
        "rope_theta": config.get("rotary_emb_base", 10000),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "use_sliding_window": False,
        "torch_dtype": "float16" if config.get("fp16") else "bfloat16" if config.get("bf16") else "float32",
    }


def qwen2_tensors(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What becomes of one tensor: c_attn [3 · hidden, hidden] falls into three, a buffer into none.

    Raises:
        UnsupportedModelError: a name that no Qwen 1.0 has.
    """
    if name in NAMES:
        return {NAMES[name]: tensor}
    layer = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", name)
    prefix, rest = (f"model.layers.{layer[1]}", layer[2]) if layer else ("", name.removeprefix("transformer."))
    if rest in BUFFERS:
        return {}
    if rest in LAYER_NAMES:
        return {f"{prefix}.{LAYER_NAMES[rest]}": tensor}
    if rest in (f"{FUSED}weight", f"{FUSED}bias"):
        kind = rest.removeprefix(FUSED)
        parts = zip("qkv", tensor.chunk(3, dim=0), strict=True)
        return {f"{prefix}.self_attn.{part}_proj.{kind}": rows.contiguous() for part, rows in parts}
    raise UnsupportedModelError(f"no Qwen 1.0 has a tensor {name}", where="safetensors", hint="report the model")
