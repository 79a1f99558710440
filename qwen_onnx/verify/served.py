"""Logits of a text as the engine gives them that serves: piece by piece, the cache between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen_onnx.runtime.engines.batch.model import BatchModel
from qwen_onnx.runtime.engines.batch.sight import Looked
from qwen_onnx.runtime.engines.batch.steps import PREFILL_CHUNK
from qwen_onnx.verify.softmax import Logits


def served_logits(
    model: BatchModel, ids: Sequence[int], *, looked: Looked | None = None, adapter: str | None = None
) -> Logits:
    """Of all positions, float32 [tokens, vocabulary], in the model's first row.

    Args:
        model: one that tells every position.
        looked: the prompt with its media; None: text alone.
        adapter: by the name that the model holds it under.
    """
    told = np.asarray(ids, np.int64)
    logits = np.empty((len(told), model.vocab_size), np.float32)
    for begin in range(0, len(told), PREFILL_CHUNK):
        end = min(begin + PREFILL_CHUNK, len(told))
        positions, features = (looked.positions(begin, end), looked.features(begin, end)) if looked else (None, None)
        logits[begin:end] = model.every_position(
            0, told[begin:end], begin, positions=positions, features=features, adapter=adapter
        )
    return logits
