"""A checkpoint as a GGUF file in float32, which llama.cpp quantises: the names and keys of its own converter.

Without a tokenizer: what is measured are token ids, and sizes of weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_onnx.errors import UnsupportedModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter

# of llama.cpp, by architecture: dense ones, whose tensors need no other order
ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
SUFFIXES = (".weight", ".bias")


def write_gguf(checkpoint: Path, target: Path) -> None:
    """Write ``target``.

    Raises:
        UnsupportedModelError: an architecture or rotary positions that this does not know, or a config without a key.
    """
    import gguf

    from qwen_onnx.export.weights import CheckpointWeights
    from qwen_onnx.sources.checkpoint import read_json

    config = read_json(checkpoint / "config.json")
    name = architecture_of(config, checkpoint)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], config["num_hidden_layers"])
    weights = CheckpointWeights(checkpoint)
    writer = gguf.GGUFWriter(target, name)
    try:
        _describe(writer, config)
    except KeyError as error:
        raise UnsupportedModelError(f"config.json has no {error}", where=str(checkpoint)) from error
    for stored in weights.names():
        found = names.get_name(stored, try_suffixes=SUFFIXES)
        if found is None:
            raise UnsupportedModelError(f"llama.cpp's {name} has no tensor for {stored}", where=str(checkpoint))
        if stored == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        writer.add_tensor(found, weights.tensor(stored).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def architecture_of(config: dict[str, Any], checkpoint: Path) -> str:
    """llama.cpp's name of the architecture; raises as ``write_gguf``."""
    given = (config.get("architectures") or ["none"])[0]
    if given not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{given} is not converted to GGUF here, only {', '.join(ARCHITECTURES)}",
            where=f"{checkpoint}/config.json",
            hint="leave llama.cpp out: --peers openvino-int4",
        )
    if _rotary(config).get("rope_type", "default") != "default":
        raise UnsupportedModelError("scaled rotary positions are not converted to GGUF here", where=str(checkpoint))
    return ARCHITECTURES[given]


def _rotary(config: dict[str, Any]) -> dict[str, Any]:
    # transformers 4 has the scaling and the base apart
    scaling = config.get("rope_scaling") or {}
    return config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0), **scaling}


def _describe(writer: GGUFWriter, config: dict[str, Any]) -> None:
    import gguf

    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_freq_base(float(_rotary(config)["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
