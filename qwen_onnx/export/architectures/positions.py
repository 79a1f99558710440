"""YaRN for genai's builder, whose own differs from that of transformers: the teacher's frequencies are taken instead.

genai 0.18 takes missing betas for zero, where transformers takes 32 and 1, and does not round the range between them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from qwen_onnx.export.architectures.stock import Model

YARN = "yarn"
# a key of ours among genai's, for frequencies that need no further scaling
GIVEN = "given"


@contextlib.contextmanager
def frequencies_of_transformers() -> Iterator[None]:
    """genai's rotary tables, with YaRN's frequencies and magnitude as transformers computes them."""
    stock = Model.make_rope_init, Model.make_inv_freq_rescaled

    def make_rope_init(self: Any, config: Any) -> None:
        rope = getattr(config, "rope_parameters", None)
        if not isinstance(rope, dict) or rope.get("rope_type") != YARN:
            stock[0](self, config)
            return
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, magnitude = ROPE_INIT_FUNCTIONS[YARN](config, None)
        self.rope_attrs["mscale"] = magnitude
        self.rope_attrs["rescale_inv_freq"] = {GIVEN: frequencies}

    def make_inv_freq_rescaled(self: Any, frequencies: Any) -> Any:
        given = self.rope_attrs["rescale_inv_freq"].get(GIVEN)
        return stock[1](self, frequencies) if given is None else given

    Model.make_rope_init, Model.make_inv_freq_rescaled = make_rope_init, make_inv_freq_rescaled
    try:
        yield
    finally:
        Model.make_rope_init, Model.make_inv_freq_rescaled = stock
