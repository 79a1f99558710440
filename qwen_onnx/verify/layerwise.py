"""PyTorch's speed on a model that PyTorch does not fit in: one layer of each kind and the head, multiplied.

The layers have the real shape and random weights, which take as long as any others. Each layer's time is measured
inside a whole forward pass, with its KV cache; the time of the pass is what remains beside the layers plus each kind's
time as often as the model has it. A head larger than ``HEAD_BYTES`` is timed in part, and multiplied likewise.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from qwen_onnx.errors import VerificationError
from qwen_onnx.verify.baseline import greedy
from qwen_onnx.verify.timed import Timed

Kind = tuple[Any, ...]

# in float32; larger than what a processor's caches hold, so that the rest of the head takes as long per byte
HEAD_BYTES = 256 << 20


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
        tokens, rows = config.vocab_size, min(config.vocab_size, max(HEAD_BYTES // (4 * config.hidden_size), 1))
        model: Any = AutoModelForCausalLM.from_config(_reduced(config, kinds, first, rows)).float().eval()
        self.repeats: list[float] = list(counts.values())
        watched = list(model.model.layers)
        head = "the head"
        if rows < tokens:
            head = f"{rows:,} of the head's {tokens:,} rows"
            self.repeats.append(tokens / rows)
            watched.append(model.lm_head)
        self.computed = (
            f"not measured: {len(first)} of {len(kinds)} layers and {head} were timed, "
            "and multiplied; memory is that of the float32 weights"
        )
        self._absent = 4 * (_weights(whole) - _weights(model))
        self._spent = [0.0] * len(watched)

        def generate(ids: Sequence[int], count: int) -> Iterator[int]:
            # of the table, too, only those rows are there
            return greedy(model, [token % rows for token in ids], count)

        super().__init__(generate)
        for place, module in enumerate(watched):
            _watch(module, place, self._spent)

    def decode(self, count: int) -> float:
        """Seconds that the next ``count`` tokens take with all layers and the whole head."""
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


def _reduced(config: Any, kinds: Sequence[Kind], first: Sequence[int], rows: int) -> Any:
    """The configuration with the layers ``first`` and ``rows`` of the head alone.

    The table is the head's, since a token reads one row of it.
    """
    smaller = deepcopy(config)
    # a token of padding may be beyond the rows, and none is read
    smaller.vocab_size, smaller.pad_token_id = rows, None
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


def _watch(module: Any, place: int, spent: list[float]) -> None:
    """Add the seconds of every pass through ``module`` to ``spent[place]``."""
    begun = 0.0

    def before(*_: Any) -> None:
        nonlocal begun
        begun = time.perf_counter()

    def after(*_: Any) -> None:
        spent[place] += time.perf_counter() - begun

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
