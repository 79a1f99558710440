"""A tiny seeded Qwen 1.0 checkpoint, and its published equations and tokenizer in plain form."""

from __future__ import annotations

import base64
import json
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import regex
import torch
from safetensors.torch import load_file, save_file

HIDDEN, HEADS, LAYERS, WIDTH, VOCABULARY, CONTEXT = 64, 4, 2, 128, 640, 512
CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 2 * WIDTH,
    "kv_channels": HIDDEN // HEADS,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 8192,
    "seq_length": CONTEXT,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "no_bias": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
}
TEXT = "The model counts: 1, 2, 3. It's the model's own counting, isn't it? Die Zählung. 数を数える。 " * 3
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def learnt_ranks(count: int = 50) -> dict[bytes, int]:
    """Ranks of 256 bytes in an order of their own, then of the most frequent pairs of ``TEXT``."""
    ranks = {bytes([(byte * 7 + 3) % 256]): byte for byte in range(256)}
    words = [[bytes([byte]) for byte in word.encode()] for word in regex.findall(PATTERN, TEXT)]
    for _ in range(count):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        (left, right), _ = pairs.most_common(1)[0]
        ranks[left + right] = len(ranks)
        words = [merged(word, left, right) for word in words]
    return ranks


def merged(word: list[bytes], left: bytes, right: bytes) -> list[bytes]:
    """``word`` with every ``left right`` joined."""
    out: list[bytes] = []
    for part in word:
        if out and out[-1] == left and part == right:
            out[-1] += part
        else:
            out.append(part)
    return out


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    """A tiktoken file."""
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()))


def published_encode(text: str, ranks: dict[bytes, int]) -> list[int]:
    """What tiktoken does: NFC, the pattern, then always the adjacent pair of lowest rank."""
    ids: list[int] = []
    for piece in regex.findall(PATTERN, unicodedata.normalize("NFC", text)):
        parts = [bytes([byte]) for byte in piece.encode()]
        while len(parts) > 1:
            found = [(ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts))]
            rank, i = min(found)
            if rank == len(ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def make_qwen1_checkpoint(folder: Path, seed: int = 0, chat: bool = True) -> Path:
    """Write a random Qwen 1.0 as its authors publish one: two shards, a tiktoken file, no tokenizer.json."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def norm() -> torch.Tensor:
        return 1 + 0.1 * torch.randn(HIDDEN, generator=generator)

    ends = {
        "transformer.wte.weight": matrix(VOCABULARY, HIDDEN),
        "transformer.ln_f.weight": norm(),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
    }
    layers: dict[str, torch.Tensor] = {"transformer.rotary_emb.inv_freq": torch.ones(8)}
    for index in range(LAYERS):
        layers |= {
            f"transformer.h.{index}.{name}": value
            for name, value in {
                "ln_1.weight": norm(),
                "attn.c_attn.weight": matrix(3 * HIDDEN, HIDDEN),
                "attn.c_attn.bias": torch.randn(3 * HIDDEN, generator=generator) * 0.1,
                "attn.c_proj.weight": matrix(HIDDEN, HIDDEN),
                "ln_2.weight": norm(),
                "mlp.w1.weight": matrix(WIDTH, HIDDEN),
                "mlp.w2.weight": matrix(WIDTH, HIDDEN),
                "mlp.c_proj.weight": matrix(HIDDEN, WIDTH),
            }.items()
        }
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate((ends, layers), start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generation = {"chat_format": "chatml" if chat else "raw", "top_p": 0.8, "do_sample": True, "max_window_size": 6144}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    write_ranks(folder / "qwen.tiktoken", learnt_ranks())
    return folder


class PublishedQwen1:
    """The equations of Qwen 1.0 (arXiv:2309.16609) within the native context, from the original tensors."""

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            self.tensors |= load_file(shard)

    def __call__(self, ids: torch.Tensor, **_: object) -> SimpleNamespace:
        """Logits [1, tokens, vocabulary] as transformers returns them."""
        t = self.tensors
        x = t["transformer.wte.weight"][ids]
        for index in range(LAYERS):
            layer = {
                name.removeprefix(f"transformer.h.{index}."): value
                for name, value in t.items()
                if name.startswith(f"transformer.h.{index}.")
            }
            x = x + self._attention(layer, self._norm(x, layer["ln_1.weight"]))
            y = self._norm(x, layer["ln_2.weight"])
            gate = y @ layer["mlp.w2.weight"].T
            x = x + ((y @ layer["mlp.w1.weight"].T) * gate * torch.sigmoid(gate)) @ layer["mlp.c_proj.weight"].T
        return SimpleNamespace(logits=self._norm(x, t["transformer.ln_f.weight"]) @ t["lm_head.weight"].T)

    @staticmethod
    def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    def _attention(self, layer: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        tokens, size = x.shape[1], HIDDEN // HEADS
        fused = x @ layer["attn.c_attn.weight"].T + layer["attn.c_attn.bias"]
        query, key, value = (part.view(tokens, HEADS, size).transpose(0, 1) for part in fused[0].split(HIDDEN, dim=-1))
        scores = self._rotated(query) @ self._rotated(key).transpose(1, 2) / size**0.5
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
        mixed = scores.softmax(-1) @ value
        return mixed.transpose(0, 1).reshape(1, tokens, HIDDEN) @ layer["attn.c_proj.weight"].T

    @staticmethod
    def _rotated(x: torch.Tensor) -> torch.Tensor:
        """Each pair (i, i + size/2) turned by position · base^(-2i/size)."""
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)
        first, second = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
