"""Random checkpoints of any size: to measure how a build behaves where no real weights can be had.

``python -m benchmarks.synthetic qwen3-0.6b FOLDER`` writes one of the shape that this model has in ``recipes/``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.errors import ConfigError
from qwen_onnx.export.weights import create_safetensors
from qwen_onnx.sources.checkpoint import INDEX_FILE

SCALE = 0.02  # standard deviation of the weights
SHARD = 1 << 30  # bytes
KNOWN = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class Size:
    """A Qwen3 by its dimensions, its head tied to the embedding.

    Attributes:
        experts: number of experts per layer, each ``intermediate`` wide; 0 is a dense model.
        qwen2: a dense Qwen2 instead: biases of q, k and v in place of norms.
    """

    hidden: int = 2048
    intermediate: int = 6144
    layers: int = 40
    heads: int = 16
    kv_heads: int = 8
    vocabulary: int = 32768
    head_dim: int = 128
    experts: int = 0
    qwen2: bool = False

    @property
    def largest(self) -> int:
        """Weights of the largest tensor."""
        return max(torch.Size(shape).numel() for shape in self.tensors().values())

    def config(self) -> dict[str, Any]:
        """``config.json`` of such a model."""
        mixture = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": self.experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": self.intermediate,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
        }
        name = "qwen2" if self.qwen2 else "qwen3"
        return {
            "architectures": [f"{name.title()}ForCausalLM"],
            "model_type": name,
            **(mixture if self.experts else {}),
            "dtype": "bfloat16",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by name, layer after layer."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (wide, self.hidden),
            "self_attn.k_proj": (narrow, self.hidden),
            "self_attn.v_proj": (narrow, self.hidden),
            "self_attn.o_proj": (self.hidden, wide),
            **({} if self.qwen2 else dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (self.head_dim,))),
            "post_attention_layernorm": (self.hidden,),
            **({"mlp.gate": (self.experts, self.hidden)} if self.experts else {}),
        }
        for place in [f"mlp.experts.{index}" for index in range(self.experts)] or ["mlp"]:
            layer |= dict.fromkeys((f"{place}.gate_proj", f"{place}.up_proj"), (self.intermediate, self.hidden))
            layer[f"{place}.down_proj"] = (self.hidden, self.intermediate)
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for index in range(self.layers):
            shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
            if self.qwen2:
                names = {"q": wide, "k": narrow, "v": narrow}
                shapes |= {f"model.layers.{index}.self_attn.{name}_proj.bias": (size,) for name, size in names.items()}
        return shapes | {"model.norm.weight": (self.hidden,)}


def size_of(model: str) -> Size:
    """Of a row of ``recipes/``.

    Raises:
        ConfigError: there is no such row, or its model is no dense Qwen2 or Qwen3 with a tied head.
    """
    family, row = load_catalog(Path(__file__).parent.parent).row(model)
    shape = row.shape
    told = (shape.hidden_size, shape.intermediate_size, shape.layers, shape.heads, shape.kv_heads, shape.vocab_size)
    sizes = [size or 0 for size in told]
    if not (all(sizes) and shape.tied and family.architecture in KNOWN):
        raise ConfigError([f"{model}: neither a Qwen2 nor a Qwen3 with a tied head, dense and of known shape"])
    hidden, inner, layers, heads, kv_heads, vocabulary = sizes
    head_dim, qwen2 = shape.head_dim or hidden // heads, family.architecture == KNOWN[0]
    return Size(hidden, inner, layers, heads, kv_heads, vocabulary, head_dim, qwen2=qwen2)


def write_checkpoint(folder: Path, size: Size, *, shard: int = SHARD, seed: int = 0) -> int:
    """Write a sharded bfloat16 checkpoint with a byte-level tokenizer; returns the bytes of its weights.

    Two layers, and four experts of each, are drawn and repeated: drawing billions of weights takes longer than it shows
    anything.
    """
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    shapes = size.tensors()
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(torch.Size(known).numel() * 2 for known in groups[-1].values()) > shard:
            groups.append({})
        groups[-1][name] = shape
    drawn: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = create_safetensors(folder / file, {name: (torch.bfloat16, shape) for name, shape in group.items()})
        for name, tensor in tensors.items():
            tensor.copy_(_values(name, tuple(tensor.shape), drawn, generator))
        index |= dict.fromkeys(group, file)
    total = sum(torch.Size(shape).numel() * 2 for shape in shapes.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / INDEX_FILE).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(size.config(), indent=1), encoding="utf-8")
    write_tokenizer(folder)
    return total


def _values(
    name: str, shape: tuple[int, ...], drawn: dict[str, torch.Tensor], generator: torch.Generator
) -> torch.Tensor:
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    parts = name.split(".")
    if parts[1] == "layers":
        parts[2] = str(int(parts[2]) % 2)
    if "experts" in parts:
        parts[5] = str(int(parts[5]) % 4)
    key = ".".join(parts)
    if key not in drawn:
        drawn[key] = (torch.randn(shape, generator=generator) * SCALE).to(torch.bfloat16)
    return drawn[key]


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=specials[0], eos_token=specials[1])
    tokenizer.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.synthetic", description=__doc__)
    parser.add_argument("model", help="a row of recipes/, see qwen-onnx list")
    parser.add_argument("folder", type=Path, help="new")
    given = parser.parse_args(arguments)
    print(f"{write_checkpoint(given.folder, size_of(given.model)) / 1e9:.2f} GB in {given.folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
