"""Llama-type GGUF → Qwen2ForCausalLM checkpoint.

A Qwen2 attention block is a Llama attention block with q/k/v biases. Zero biases make the two functions
equal to the last bit, so a Llama checkpoint can stand in for a Qwen2 one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_onnx.errors import SourceError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

DITHER_BLOCK = 32


def write_qwen2_checkpoint(gguf: Path, folder: Path) -> None:
    """Write fp32 safetensors, config, tokenizer and chat template of ``gguf`` into ``folder``.

    Raises:
        SourceError: the file is truncated or not a GGUF.
        UnsupportedModelError: not a Llama, or one with biases or scaled RoPE.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    try:
        llama = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False)
    except (ValueError, OSError, RuntimeError, LookupError, ArithmeticError, TypeError, MemoryError) as error:
        raise SourceError(f"the GGUF cannot be read: {error}", where=str(gguf), hint="fetch it again") from error
    config = llama.config
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise UnsupportedModelError(
            f"only a bias-free Llama GGUF maps onto Qwen2, this is {config.model_type}",
            where=str(gguf),
            hint="use a safetensors checkpoint of the model",
        )
    model = Qwen2ForCausalLM(Qwen2Config(**_qwen2_settings(config)))
    loaded = model.load_state_dict(llama.state_dict(), strict=False)
    biases = {f"model.layers.{i}.self_attn.{p}_proj.bias" for i in range(config.num_hidden_layers) for p in "qkv"}
    if set(loaded.missing_keys) - {"lm_head.weight"} != biases or loaded.unexpected_keys:
        raise UnsupportedModelError("the weights do not map onto Qwen2", where=str(gguf), hint="report the model")
    for name, parameter in model.named_parameters():
        if name in biases:
            parameter.data.zero_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _qwen2_settings(config: Any) -> dict[str, Any]:
    kept = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters bos_token_id eos_token_id"
    )
    settings = {name: getattr(config, name) for name in kept.split()}
    return settings | {"pad_token_id": getattr(config, "pad_token_id", None)}


def write_dithered_checkpoint(source: Path, folder: Path, seed: int) -> None:
    """Copy a checkpoint with uniform noise of half a 4-bit step (block of 32) on every matrix.

    A proof that a quantisation does not live from weights that already lie on its grid.

    Args:
        source: checkpoint folder.
        folder: empty folder for the copy.
        seed: of the noise.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = _dither(parameter.data, generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)


def _dither(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``weight`` [out, in] plus noise; the step of a block is its range over 15."""
    import torch

    blocks = weight.reshape(weight.shape[0], -1, DITHER_BLOCK)
    step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / 15
    noise = torch.rand(blocks.shape, generator=generator) - 0.5
    return (blocks + noise * step).reshape(weight.shape)
