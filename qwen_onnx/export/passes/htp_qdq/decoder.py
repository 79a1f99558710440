"""The Qwen2 and Qwen3 decoder in fixed shapes, for ``writer.py`` to write.

Inputs are the embeddings of a window of tokens, their rotary tables, an additive mask and the KV cache; outputs are the
logits and what the window adds to the cache. Keys are kept transposed, so that no step transposes the cache.

The residual stream and the sums into it stay float (the HTP computes them in fp16): the first token's hidden states
are hundreds of times larger than all others' ("massive activations", Sun et al. 2024, arXiv:2402.17762), which a 16-bit
grid cannot hold beside them. The norms are ``RMSNormalization``: on the HTP simulator of QNN 2.7 a 16-bit Reciprocal is
wrong and a division is fifty times less exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_onnx.errors import ExportError
from qwen_onnx.export.passes.htp_qdq.linears import Linears
from qwen_onnx.export.passes.htp_qdq.writer import Value, Writer

EMBEDDINGS, COSINES, SINES, MASK, LOGITS = "inputs_embeds", "cos", "sin", "mask", "logits"


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder and of the window and the cache that its graph is made for."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    eps: float
    tokens: int
    cache: int

    @classmethod
    def read(cls, config: dict[str, Any], tokens: int, cache: int) -> Sizes:
        """From a checkpoint's ``config.json``.

        Raises:
            ExportError: the attention of some layer is not full attention.
        """
        kinds = set(config.get("layer_types") or []) - {"full_attention"}
        if kinds or config.get("use_sliding_window"):
            raise ExportError(f"the HTP graph has full attention only, the model has {', '.join(kinds) or 'a window'}")
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
            eps=config["rms_norm_eps"],
            tokens=tokens,
            cache=cache,
        )


class Decoder:
    """Writes the decoder of ``linears`` with ``writer``."""

    def __init__(self, writer: Writer, linears: Linears, sizes: Sizes) -> None:
        self.w, self.linears, self.sizes = writer, linears, sizes

    def write(self) -> Any:
        """The whole model."""
        w, s = self.w, self.sizes
        rotary = (1, 1, s.tokens, s.head_dim)
        embedded = w.input(EMBEDDINGS, (1, s.tokens, s.hidden), EMBEDDINGS)
        self.cos, self.sin = w.input(COSINES, rotary, COSINES), w.input(SINES, rotary, SINES)
        self.mask = w.input(MASK, (1, 1, s.tokens, s.cache + s.tokens), MASK)
        hidden = Value(embedded.name, None)
        for index in range(s.layers):
            prefix = f"model.layers.{index}"
            hidden = self._add(hidden, self._attention(hidden, index), f"{prefix}.attended")
            hidden = self._add(hidden, self._mlp(hidden, f"{prefix}.mlp", prefix), f"{prefix}.output")
        final = self._norm(hidden, "model.norm")
        logits = w.compute("MatMul", [final, w.weights(self.linears.linear("lm_head"))], LOGITS)
        w.output(logits, LOGITS, (1, s.tokens, s.vocabulary))
        return w.model()

    def _add(self, hidden: Value, update: Value, name: str) -> Value:
        return self.w.floating("Add", [hidden, update], name)

    def _norm(self, hidden: Value, name: str) -> Value:
        weight = self.w.exact(f"{name}.weight", self.linears.array(f"{name}.weight"))
        return self.w.compute("RMSNormalization", [hidden, weight], f"{name}.out", axis=-1, epsilon=self.sizes.eps)

    def _linear(self, x: Value, name: str, factor: float = 1.0) -> Value:
        weights = self.w.weights(self.linears.linear(name, factor))
        biased = f"{name}.bias" in self.linears
        product = self.w.compute("MatMul", [x, weights], f"{name}.product" if biased else f"{name}.out")
        if not biased:
            return product
        bias = self.w.constant(f"{name}.bias", self.linears.array(f"{name}.bias") * np.float32(factor))
        return self.w.compute("Add", [product, bias], f"{name}.out")

    def _shape(self, *sizes: int) -> str:
        return self.w.exact("shape." + "x".join(map(str, sizes)), np.array(sizes, np.int64))

    def _reshape(self, x: Value, name: str, *sizes: int) -> Value:
        return self.w.move("Reshape", [x, self._shape(*sizes)], name)

    def _slice(self, x: Value, name: str, begin: int, end: int) -> Value:
        bounds = [self.w.exact(f"index.{number}", np.array([number], np.int64)) for number in (begin, end, 3)]
        return self.w.move("Slice", [x, *bounds], name)

    def _heads(self, x: Value, name: str, count: int, factor: float = 1.0, result: str | None = None) -> Value:
        """Project to ``count`` heads: [1, heads, tokens, head_dim], normalised where the model does that."""
        s, norm = self.sizes, f"{name.replace('_proj', '_norm')}.weight"
        normed = norm in self.linears
        projected = self._linear(x, name, 1.0 if normed else factor)
        heads = self._reshape(projected, f"{name}.split", 1, s.tokens, count, s.head_dim)
        if normed:
            weight = self.w.constant(norm, self.linears.array(norm) * np.float32(factor))
            inputs = [heads, weight]
            heads = self.w.compute("RMSNormalization", inputs, f"{name}.normed", axis=-1, epsilon=s.eps)
        return self.w.move("Transpose", [heads], result or f"{name}.heads", perm=[0, 2, 1, 3])

    def _rotate(self, x: Value, name: str) -> Value:
        """Rotary embedding; the sign of the swapped half is in the table of sines."""
        w, half = self.w, self.sizes.head_dim // 2
        lower = self._slice(x, f"{name}.lower", 0, half)
        upper = self._slice(x, f"{name}.upper", half, 2 * half)
        swapped = w.move("Concat", [upper, lower], f"{name}.swapped", axis=3)
        turned = [
            w.compute("Mul", [x, self.cos], f"{name}.by_cos"),
            w.compute("Mul", [swapped, self.sin], f"{name}.by_sin"),
        ]
        return w.compute("Add", turned, f"{name}.rotated")

    def _attention(self, hidden: Value, index: int) -> Value:
        w, s = self.w, self.sizes
        layer = f"model.layers.{index}"
        name, total, group = f"{layer}.self_attn", s.cache + s.tokens, s.heads // s.kv_heads
        x = self._norm(hidden, f"{layer}.input_layernorm")
        q = self._rotate(self._heads(x, f"{name}.q_proj", s.heads, s.head_dim**-0.5), f"{name}.q")
        k = self._rotate(self._heads(x, f"{name}.k_proj", s.kv_heads), f"{name}.k")
        v = self._heads(x, f"{name}.v_proj", s.kv_heads, result=f"present_v.{index}")
        assert k.key
        assert v.key
        past_k = w.input(f"past_k.{index}", (1, s.kv_heads, s.head_dim, s.cache), k.key)
        past_v = w.input(f"past_v.{index}", (1, s.kv_heads, s.cache, s.head_dim), v.key)
        k = w.move("Transpose", [k], f"present_k.{index}", perm=[0, 1, 3, 2])
        w.output(k, f"present_k.{index}", (1, s.kv_heads, s.head_dim, s.tokens))
        w.output(v, f"present_v.{index}", (1, s.kv_heads, s.tokens, s.head_dim))
        keys = w.move("Concat", [past_k, k], f"{name}.keys", axis=3)
        values = w.move("Concat", [past_v, v], f"{name}.values", axis=2)
        # queries that share a key head stand below each other: no copy of the cache per query head
        q = self._reshape(q, f"{name}.queries", 1, s.kv_heads, group * s.tokens, s.head_dim)
        scores = w.compute("MatMul", [q, keys], f"{name}.scores")
        scores = self._reshape(scores, f"{name}.scores_by_head", 1, s.heads, s.tokens, total)
        masked = w.compute("Add", [scores, self.mask], f"{name}.masked")
        weights = w.compute("Softmax", [masked], f"{name}.probabilities", axis=-1)
        weights = self._reshape(weights, f"{name}.probabilities_by_key", 1, s.kv_heads, group * s.tokens, total)
        mixed = w.compute("MatMul", [weights, values], f"{name}.mixed")
        mixed = self._reshape(mixed, f"{name}.mixed_by_head", 1, s.heads, s.tokens, s.head_dim)
        mixed = w.move("Transpose", [mixed], f"{name}.mixed_by_token", perm=[0, 2, 1, 3])
        joined = self._reshape(mixed, f"{name}.joined", 1, s.tokens, s.heads * s.head_dim)
        return self._linear(joined, f"{name}.o_proj")

    def _mlp(self, hidden: Value, name: str, layer: str) -> Value:
        w = self.w
        x = self._norm(hidden, f"{layer}.post_attention_layernorm")
        gate, up = self._linear(x, f"{name}.gate_proj"), self._linear(x, f"{name}.up_proj")
        sigmoid = w.compute("Sigmoid", [gate], f"{name}.sigmoid")
        silu = w.compute("Mul", [gate, sigmoid], f"{name}.silu")
        return self._linear(w.compute("Mul", [silu, up], f"{name}.gated"), f"{name}.down_proj")
