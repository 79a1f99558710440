"""PyTorch's speed on a model that PyTorch does not fit in: one layer of each kind and the head, multiplied.

The layers have the real shape and random weights, which take as long as any others. Each layer's time is measured
inside a whole forward pass, with its KV cache; the time of the pass is what remains beside the layers plus each kind's
time as often as the model has it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from qwen_onnx.errors import VerificationError
from qwen_onnx.verify.baseline import greedy
from qwen_onnx.verify.timed import Timed

Kind = tuple[Any, ...]


class LayerTimer(Timed):
    """PyTorch fp32 with one decoder layer of each kind, timed as if it had all.

    Args:
        checkpoint: folder whose ``config.json`` gives the shape; its weights are not read.

    Raises:
        VerificationError: transformers does not know the architecture.
    """

    def __init__(self, checkpoint: Path, threads: int) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(threads)
        try:
            config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"):
                whole = AutoModelForCausalLM.from_config(config)
        except (OSError, ValueError, KeyError) as error:
            raise VerificationError(f"PyTorch does not know this model: {error}", where=str(checkpoint)) from error
        kinds = [_kind(layer) for layer in whole.model.layers]
        counts = Counter(kinds)
        first = [kinds.index(kind) for kind in counts]
        model: Any = AutoModelForCausalLM.from_config(_reduced(config, kinds, first)).float().eval()
        self.repeats = list(counts.values())
        self.computed = (
            f"not measured: {len(first)} of {len(kinds)} layers and the head were timed, "
            "and multiplied; memory is that of the float32 weights"
        )
        self._absent = 4 * (_weights(whole) - _weights(model))
        self._spent = [0.0] * len(first)
        super().__init__(partial(greedy, model))
        for place, layer in enumerate(model.model.layers):
            _watch(layer, place, self._spent)

    def decode(self, count: int) -> float:
        """Seconds that the next ``count`` tokens take with all layers."""
        self._spent[:] = [0.0] * len(self._spent)
        seconds = super().decode(count)
        return seconds + sum((repeat - 1) * spent for repeat, spent in zip(self.repeats, self._spent, strict=True))

    def peak_memory(self, measured: int) -> int:
        """``measured`` and the weights that are not here."""
        return measured + self._absent


def _weights(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _kind(layer: Any) -> Kind:
    """Layers of one kind have the same parts of the same shapes."""
    return tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())


def _reduced(config: Any, kinds: Sequence[Kind], first: Sequence[int]) -> Any:
    """The configuration with the layers ``first`` alone; the table is the head's, since a token reads one row of it."""
    smaller = deepcopy(config)
    if getattr(config, "layer_types", None):
        smaller.layer_types = [config.layer_types[index] for index in first]
    dense = getattr(config, "mlp_only_layers", None)
    if dense is not None:
        sparse = [any("expert" in name for name, _ in kinds[index]) for index in first]
        smaller.decoder_sparse_step = 1
        smaller.mlp_only_layers = [place for place, experts in enumerate(sparse) if not experts]
    smaller.num_hidden_layers = len(first)
    smaller.tie_word_embeddings = True
    return smaller


def _watch(layer: Any, place: int, spent: list[float]) -> None:
    """Add the seconds of every pass through ``layer`` to ``spent[place]``."""
    begun = 0.0

    def before(*_: Any) -> None:
        nonlocal begun
        begun = time.perf_counter()

    def after(*_: Any) -> None:
        spent[place] += time.perf_counter() - begun

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)
