"""What each architecture needs around genai's builder; ``builder.build`` looks it up by the checkpoint's own name.

genai 0.18 dispatches on ``config.architectures[0]`` through a fixed list of names. An architecture that it lacks is
presented under the name of its nearest relative, whose builder class is swapped for ours while it runs; the name also
becomes the model type that the runtime knows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen_onnx.errors import UnsupportedModelError
from qwen_onnx.export.architectures import linear_attention, moe, qwen3_next, vision
from qwen_onnx.export.architectures.stock import builder
from qwen_onnx.sources.audio_tower import QWEN2_AUDIO
from qwen_onnx.sources.checkpoint import read_json
from qwen_onnx.sources.chunked_tower import QWEN3_ASR
from qwen_onnx.sources.text_form import WHOLE_ARCHITECTURE
from qwen_onnx.sources.vision_config import QWEN2_5_VL, QWEN2_VL, QWEN3_VL, QWEN3_VL_MOE


@dataclass(frozen=True)
class Architecture:
    """How an architecture reaches genai's builder.

    Attributes:
        presented: the name that genai's builder knows.
        replaces: its builder class under that name, for which ``model`` stands in.
        model: our builder class; None takes the stock one.
        options: more options for the builder, as ``key=value``.
    """

    presented: str
    replaces: str = ""
    model: type | None = None
    options: tuple[str, ...] = ()


# The multi-token-prediction head excludes prune_lm_head, and our runtime does not draft.
NO_DRAFT = ("exclude_mtp=true",)

# of a model with a tower: its pass writes the embedding, which genai runs apart
APART = ("exclude_embeds=true",)
SEEING = Architecture(QWEN2_5_VL, "Qwen25VLTextModel", vision.VisionDecoder)

# What genai 0.18 makes of each; figures are in tests/export/test_architectures.py.
ARCHITECTURES: dict[str, Architecture] = {
    # right. A Qwen 1.0 arrives as one: sources.py converts it, since PyTorch and the quantiser have to read it, too
    "Qwen2ForCausalLM": Architecture("Qwen2ForCausalLM"),
    "Qwen3ForCausalLM": Architecture("Qwen3ForCausalLM"),
    # a Qwen2 and a Qwen3 beside their towers
    QWEN2_AUDIO: Architecture("Qwen2ForCausalLM"),
    QWEN3_ASR: Architecture("Qwen3ForCausalLM"),
    # a decoder without tower or embedding; of Qwen2-VL "not currently supported"
    QWEN2_VL: SEEING,
    QWEN2_5_VL: SEEING,
    # a decoder without DeepStack, which answers otherwise
    QWEN3_VL: Architecture(QWEN3_VL, "Qwen3VLTextModel", vision.DeepStackDecoder),
    # "not currently supported"
    QWEN3_VL_MOE: Architecture(QWEN3_VL, "Qwen3VLTextModel", vision.DeepStackMoEDecoder),
    # "not currently supported". The operators that the export needs are there
    "Qwen2MoeForCausalLM": Architecture("Qwen2ForCausalLM", "QwenModel", moe.Qwen2MoEModel),
    "Qwen3MoeForCausalLM": Architecture("Qwen3ForCausalLM", "Qwen3Model", moe.Qwen3MoEModel),
    "Qwen3NextForCausalLM": Architecture(
        "Qwen3_5MoeForConditionalGeneration", "Qwen35MoEModel", qwen3_next.Qwen3NextModel, NO_DRAFT
    ),
    # right, but for projections that come in codes
    "Qwen3_5ForConditionalGeneration": Architecture(
        "Qwen3_5ForConditionalGeneration", "Qwen35Model", linear_attention.Qwen35CodedProjections, NO_DRAFT
    ),
    # right, but rounds the routers to int4 and lets the experts' accuracy level be
    "Qwen3_5MoeForConditionalGeneration": Architecture(
        "Qwen3_5MoeForConditionalGeneration", "Qwen35MoEModel", moe.Qwen35MoEFloatRouting, NO_DRAFT
    ),
}


def architecture_of(checkpoint: Path) -> Architecture:
    """The entry for ``checkpoint``.

    Raises:
        UnsupportedModelError: no entry.
    """
    config = read_json(checkpoint / "config.json")
    whole = config.get(WHOLE_ARCHITECTURE)
    name = whole or (config.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"no exporter for {name}; known: {', '.join(sorted(ARCHITECTURES))}",
            where=str(checkpoint / "config.json"),
            hint="choose a model of the catalog: qwen-onnx list",
        )
    found = ARCHITECTURES[name]
    return replace(found, options=(*found.options, *APART)) if whole else found


@contextlib.contextmanager
def installed(architecture: Architecture) -> Iterator[None]:
    """genai's dispatch with our class in place of the one that it replaces."""
    if architecture.model is None:
        yield
        return
    stock = getattr(builder, architecture.replaces)
    setattr(builder, architecture.replaces, architecture.model)
    try:
        yield
    finally:
        setattr(builder, architecture.replaces, stock)


def present(options: dict[str, Any], architecture: Architecture) -> None:
    """Put the name that genai knows into the parsed options."""
    options["hf_details"]["hf_config"].architectures = [architecture.presented]
