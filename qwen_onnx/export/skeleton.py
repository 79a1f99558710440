"""A causal language model without weights whose decoder layers are filled one at a time.

``AutoModelForCausalLM.from_config`` on the meta device gives every module and the glue between them (masks, rotary
embedding); a layer's parameters are copied in when it is needed and dropped again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qwen_onnx.errors import ExportError
from qwen_onnx.export.experts import STACKED, StoredExperts, are_experts
from qwen_onnx.export.weights import CheckpointWeights, Scratch
from qwen_onnx.processes.memory import return_free_memory

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm"
# old checkpoints store this table, which every model computes
COMPUTED = "rotary_emb.inv_freq"
# linear modules that stay float: what weighs the shared expert, and the gates of linear attention
GATES = ("shared_expert_gate", "in_proj_a", "in_proj_b", "in_proj_ba")


class Skeleton:
    """A model whose decoder layers are on the meta device until ``layer`` fills one.

    Args:
        checkpoint: Hugging Face folder of a causal language model with ``model.layers``.
        scratch: where a layer's weights live while it is filled.
    """

    def __init__(self, checkpoint: Path, scratch: Scratch) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.weights = CheckpointWeights(checkpoint, plain=True)
        self.scratch = scratch
        # of a model with a vision tower too, the part that reads text
        self.config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False).get_text_config()
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).eval()
        self.model.config.use_cache = False
        # one expert after the other, which needs one of them at a time
        self.model.config._experts_implementation = "eager"
        self.model.requires_grad_(False)
        inner = self.model.model
        # its buffers are computed, not stored
        inner.rotary_emb = type(inner.rotary_emb)(config=self.config)
        self.count = len(inner.layers)

    @property
    def head_name(self) -> str:
        """The tensor that the head multiplies with: its own, or the embedding when the two are tied."""
        return EMBEDDING if self.config.tie_word_embeddings or HEAD not in self.weights else HEAD

    def linears(self, index: int) -> dict[str, torch.nn.Linear]:
        """The matrices of one layer, experts and ``GATES`` apart, by name within it; they may be on the meta device."""
        modules = self.model.model.layers[index].named_modules()
        return {
            name: module for name, module in modules if isinstance(module, torch.nn.Linear) and not name.endswith(GATES)
        }

    def experts(self, index: int) -> dict[str, torch.nn.Module]:
        """The module of all experts of one layer by its name within it; empty where the layer has none."""
        modules = self.model.model.layers[index].named_modules()
        return {name: module for name, module in modules if are_experts(module)}

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [.., hidden] of token ids, in float32; only the rows that are asked for are read."""
        return torch.nn.functional.embedding(ids, self.weights.tensor(EMBEDDING)).float()

    def arguments(self, hidden: torch.Tensor) -> list[dict[str, Any]]:
        """What the model calls each of its layers with besides the hidden states.

        Args:
            hidden: [batch, tokens, hidden]; the masks and positions depend on its shape only.
        """
        caught: list[dict[str, Any]] = []

        def catch(hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
            caught.append(arguments)
            return hidden_states

        inner = self.model.model
        norm = inner.norm.forward
        inner.norm.forward = lambda states: states
        for layer in inner.layers:
            layer.forward = catch
        with torch.no_grad():
            inner(inputs_embeds=hidden, use_cache=False)
        inner.norm.forward = norm
        for layer in inner.layers:
            del layer.forward
        return caught

    @contextmanager
    def layer(self, index: int) -> Iterator[torch.nn.Module]:
        """Layer ``index`` with its float32 weights; they are gone afterwards.

        Raises:
            ExportError: the checkpoint's weights are not those of the layer.
        """
        layer: torch.nn.Module = self.model.model.layers[index]
        self._fill(layer, f"model.layers.{index}")
        yield layer
        self._empty(layer)
        return_free_memory()

    @contextmanager
    def norm(self) -> Iterator[torch.nn.Module]:
        """The norm after the last layer, filled."""
        norm: torch.nn.Module = self.model.model.norm
        self._fill(norm, NORM)
        yield norm
        self._empty(norm)

    def _empty(self, module: torch.nn.Module) -> None:
        """Drop the weights that a turn of the module needed."""
        module.to("meta")

    def _fill(self, module: torch.nn.Module, prefix: str) -> None:
        wanted = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
        stored = {name.removeprefix(f"{prefix}.") for name in self.weights.names(f"{prefix}.")}
        stored = {name for name in stored if not name.endswith(COMPUTED)}
        experts = self._experts_one_by_one(module, prefix, stored)
        for path, found in experts.items():
            stored -= {name.removeprefix(f"{prefix}.") for names in found.names() for name in names}
            stored |= {f"{path}.{name}" for name in STACKED}
        if wanted != stored:
            faults = [f"lacks {name}" for name in sorted(wanted - stored)[:3]]
            faults += [f"has {name}" for name in sorted(stored - wanted)[:3]]
            raise ExportError(
                f"the weights do not fit the architecture: the checkpoint {', '.join(faults)}",
                where=f"{self.weights.folder}: {prefix}",
                hint="use a checkpoint that transformers saved for this architecture",
            )
        # one file per place, whatever the layer: the next layer takes the same room
        kind = "norm" if prefix == NORM else "layer"
        filled = {
            name: self.scratch.float32(f"{kind}.{name}", self.weights.tensor(f"{prefix}.{name}"))
            for name in sorted(wanted)
            if f"{prefix}.{name}" in self.weights
        }
        for path, found in experts.items():
            copies = found.copied(self.scratch, f"{kind}.{path}")
            filled |= {f"{path}.{name}": tensor for name, tensor in copies.items()}
        module.load_state_dict(filled, assign=True)
        module.requires_grad_(False)

    def _experts_one_by_one(self, module: torch.nn.Module, prefix: str, stored: set[str]) -> dict[str, StoredExperts]:
        """The experts of ``module`` that the checkpoint does not stack, by name within it."""
        found = {
            path: StoredExperts(self.weights, f"{prefix}.{path}", part.gate_up_proj.shape)
            for path, part in module.named_modules()
            if are_experts(part)
        }
        return {
            path: experts
            for path, experts in found.items()
            if stored.issuperset(name.removeprefix(f"{prefix}.") for names in experts.names() for name in names)
        }


def call(layer: torch.nn.Module, state: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """Hidden states that a decoder layer gives, whether or not it wraps them in a tuple."""
    out = layer(state, **arguments)
    result: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return result
