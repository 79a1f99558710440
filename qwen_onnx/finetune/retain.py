"""What is not to change: beside each batch of examples the adapter is held to the base's distribution over other texts.

The term is the Kullback-Leibler divergence of the adapted model from the base, in nats per token. The base is the same
model with its adapter switched off, so that nothing is stored and no second model is in memory.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint
from trl import SFTTrainer

from qwen_onnx.finetune.encode import Encoded
from qwen_onnx.finetune.estimate import LOGITS_PIECE
from qwen_onnx.finetune.train import DIVERGENCE, JUDGED


def batches(rows: Sequence[Encoded], tokens: int, seed: int) -> list[list[list[int]]]:
    """Token ids of ``rows`` in batches of at most ``tokens``, padding counted, in an order that the seed gives.

    Rows of like length share a batch; a row longer than ``tokens`` is one of its own.
    """
    found: list[list[list[int]]] = []
    for row in sorted(rows, key=lambda row: (-len(row.ids), row.line)):
        if found and len(found[-1][0]) * (len(found[-1]) + 1) <= tokens:
            found[-1].append(row.ids)
        else:
            found.append([row.ids])
    random.Random(seed).shuffle(found)
    return found


def divergence(model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """KL(base ‖ adapted) over every next token of ``rows``, summed, in nats; a scalar with a gradient.

    Args:
        model: of peft.
    """
    width, device = max(map(len, rows)), model.device
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    read = mask.bool()
    # the last token of a row has a next one, too: what the model expects there is kept as well
    causal = model.get_base_model()
    body, head = causal.get_decoder(), causal.get_output_embeddings()
    with torch.no_grad(), model.disable_adapter():
        base = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[read]
    adapted = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[read]
    pieces = zip(adapted.split(LOGITS_PIECE), base.split(LOGITS_PIECE), strict=True)
    # logits are made again on the way back: those of all tokens at once would be most of the memory
    return torch.stack([checkpoint(_of_piece, head, *piece, use_reentrant=False) for piece in pieces]).sum()


def _of_piece(head: Any, adapted: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    expected = head(base).detach().float().log_softmax(-1)
    return kl_div(head(adapted).float().log_softmax(-1), expected, log_target=True, reduction="sum")


class RetainingTrainer(SFTTrainer):  # type: ignore[misc]
    """trl's trainer; each batch of examples brings one of retained rows.

    Args:
        retained: rows to hold while training, ``held_out`` those that show whether others hold, too.
        weight: of the divergence beside the examples' loss.
        tokens: of a batch of retained rows.
    """

    def __init__(
        self, *, retained: Sequence[Encoded], held_out: Sequence[Encoded], weight: float, tokens: int, **rest: Any
    ) -> None:
        super().__init__(**rest)
        self._weight = weight
        self._learnt = batches(retained, tokens, self.args.seed)
        self._judging = batches(held_out, tokens, self.args.seed)
        self._step, self._place = -1, 0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Gradients of both terms, one after the other, so that one graph alone is in memory; the examples' loss."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        rows = self._next()
        with self.compute_loss_context_manager():
            term = divergence(model, rows) / _tokens(rows)
        self.accelerator.backward(self._weight * term / self.current_gradient_accumulation_steps)
        self._total_train_tokens += _tokens(rows)
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        self._metrics["train"][DIVERGENCE].append(term.item())
        return loss

    def _next(self) -> list[list[int]]:
        """In turn, by the count of batches, so that a training that goes on takes those that come next."""
        step = int(self.state.global_step)
        self._place = self._place + 1 if step == self._step else 0
        self._step = step
        return self._learnt[(step * self.args.gradient_accumulation_steps + self._place) % len(self._learnt)]

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """The examples' loss, the divergence, and the sum of both that a step is judged by."""
        found = super().evaluation_loop(*args, **options)
        prefix = options.get("metric_key_prefix", "eval")
        with torch.no_grad(), self.compute_loss_context_manager():
            total = sum(float(divergence(self.model, rows)) for rows in self._judging)
        apart = total / sum(map(_tokens, self._judging))
        found.metrics[f"{prefix}_{DIVERGENCE}"] = apart
        found.metrics[f"{prefix}_{JUDGED}"] = found.metrics[f"{prefix}_loss"] + self._weight * apart
        return found


def _tokens(rows: Sequence[Sequence[int]]) -> int:
    return sum(map(len, rows))
