"""``mtp.onnx``: a model's head for multi-token prediction, which may be beside its decoder.

No configuration names it, since onnxruntime-genai would drive it where it cannot: the file is there, or there is none.
"""

from __future__ import annotations

from pathlib import Path

DRAFT_HEAD = "mtp.onnx"
# inputs and outputs beside attention_mask, position_ids, and one layer's keys and values
EMBEDDED, HIDDEN, NEXT = "inputs_embeds", "hidden_states", "hidden_states_out"
# tokens that its tables of rotary positions have; it reads no further back
PLACES = 1 << 14


def has_draft_head(folder: Path) -> bool:
    """Whether an artifact has one."""
    return (folder / DRAFT_HEAD).exists()
