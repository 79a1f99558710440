"""What ``config.json`` and ``preprocessor_config.json`` say of a vision tower, bounded before it is used."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qwen_onnx.catalog.architectures import text_config
from qwen_onnx.errors import UnsupportedModelError
from qwen_onnx.sources.checkpoint import read_json

PREPROCESSOR, VISION_CONFIG = "preprocessor_config.json", "vision_config.json"
# key of the text model's config.json: how many of its layers get features of pictures besides their input
DEEPSTACK_LAYERS = "deepstack_layers"
QWEN2_VL, QWEN2_5_VL = "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"
QWEN3_VL, QWEN3_VL_MOE = "Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"
QWEN3_5, QWEN3_5_MOE = "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"
MOST = {
    "depth": 256,
    "hidden_size": 1 << 16,
    "embed_dim": 1 << 16,
    "mlp_ratio": 16,
    "intermediate_size": 1 << 18,
    "num_heads": 256,
    "patch_size": 64,
    "temporal_patch_size": 8,
    "spatial_merge_size": 8,
    "window_size": 1 << 12,
    "out_hidden_size": 1 << 16,
    "in_channels": 16,
    "in_chans": 16,
    "num_position_embeddings": 1 << 16,
    "tokens_per_second": 1000,
}
NORMAL = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
FEWEST_PIXELS, MOST_PIXELS = 56 * 56, 28 * 28 * 1280
LARGEST_PICTURE = 1 << 28
THETA = 10000.0
Three = tuple[float, float, float]
POSITIONS = 2304
# as in transformers; the published models say 2
PER_SECOND = 4
Time = Literal["index", "seconds", "timestamps"]


@dataclass(frozen=True)
class Style:
    """What the towers of an architecture have in common.

    Attributes:
        width, output, activation, window, positions, deepstack: where ``vision_config`` says it; empty: it has none.
        patch: the side of a patch that is not named there.
        mlp: names of a layer's two matrices; none: it has three, and RMSNorm.
        norm, merger: names of the norm and of the two matrices that make tokens of patches.
        interleaved: the text model's three axes of positions take turns, instead of one behind another.
        time: what tells the model when the frames of a video were taken, see ``VideoSettings``.
    """

    width: str
    output: str
    activation: str
    patch: int
    norm: str
    merger: tuple[str, str]
    mlp: tuple[str, ...] = ()
    window: str = ""
    positions: str = ""
    deepstack: str = ""
    interleaved: bool = False
    time: Time = "index"


_NEWER = Style(
    "hidden_size",
    "out_hidden_size",
    "gelu_pytorch_tanh",
    16,
    norm="norm",
    merger=("linear_fc1", "linear_fc2"),
    mlp=("linear_fc1", "linear_fc2"),
    positions="num_position_embeddings",
    deepstack="deepstack_visual_indexes",
    interleaved=True,
    time="timestamps",
)
STYLES = {
    QWEN2_VL: Style(
        "embed_dim", "hidden_size", "quick_gelu", 14, norm="ln_q", merger=("mlp.0", "mlp.2"), mlp=("fc1", "fc2")
    ),
    QWEN2_5_VL: Style(
        "hidden_size",
        "out_hidden_size",
        "silu",
        14,
        norm="ln_q",
        merger=("mlp.0", "mlp.2"),
        window="window_size",
        time="seconds",
    ),
    QWEN3_VL: _NEWER,
    QWEN3_VL_MOE: _NEWER,
    QWEN3_5: replace(_NEWER, deepstack=""),
    QWEN3_5_MOE: replace(_NEWER, deepstack=""),
}


@dataclass(frozen=True)
class Tower:
    """The form of a vision tower.

    Attributes:
        architecture: of the whole model.
        output: dimensions of the text model.
        window: side of a window of attention in merged patches; 0: every layer attends to the whole picture.
        full: layers that attend to the whole picture although there are windows.
        positions: side of the square table of learned positions; 0: there is none.
        deepstack: layers, in order, whose features go into the text model behind its first layers, one each.
        sections: dimensions of the text model's positions in time, down and across.
        image_token, video_token, vision_start: ids that stand for pictures in a prompt.
        vision_end: the id behind them, which configs of older models do not all name.
        per_second: positions of a second of a video, where seconds count.
    """

    architecture: str
    depth: int
    width: int
    heads: int
    inner: int
    output: int
    patch: int
    temporal_patch: int
    merge: int
    window: int
    full: tuple[int, ...]
    positions: int
    deepstack: tuple[int, ...]
    sections: tuple[int, ...]
    image_token: int
    video_token: int
    vision_start: int
    vision_end: int | None
    per_second: int

    config_name = VISION_CONFIG

    @property
    def style(self) -> Style:
        """Of its architecture."""
        return STYLES[self.architecture]

    @property
    def required(self) -> tuple[str, ...]:
        """Modules that a checkpoint must have weights of."""
        parts = ("patch_embed.proj", "blocks.0.attn.qkv", *(f"merger.{name}" for name in self.style.merger))
        return tuple(f"visual.{part}" for part in parts)

    def text_extras(self) -> dict[str, Any]:
        """What the text model's config says besides."""
        return {DEEPSTACK_LAYERS: len(self.deepstack)} if self.deepstack else {}

    def rope_extras(self) -> dict[str, Any]:
        """And its RoPE."""
        return {"mrope_section": list(self.sections)}

    @property
    def features(self) -> int:
        """Dimensions of what a picture's token gets: what it has in place of an embedding, then DeepStack's."""
        return self.output * (1 + len(self.deepstack))


def tower_of(config: dict[str, Any], where: str) -> Tower:
    """The tower that ``config``, of the whole checkpoint, describes.

    Raises:
        UnsupportedModelError: all that is missing or cannot be right.
    """
    faults: list[str] = []
    vision, text = config.get("vision_config"), text_config(config)
    vision = vision if isinstance(vision, dict) else {}
    architecture = config["architectures"][0]
    style = STYLES[architecture]

    def number(name: str, usual: int | None = None) -> int:
        value = vision.get(name, usual)
        if not (type(value) is int and 1 <= value <= MOST[name]):
            faults.append(f"vision_config.{name} is {str(value)[:40]}, not a number from 1 to {MOST[name]:,}")
            return 1
        return value

    def token(name: str) -> int:
        value = config.get(name)
        if not (type(value) is int and 0 <= value < text.get("vocab_size", 0)):
            faults.append(f"{name} is {str(value)[:40]}, not a token of the vocabulary")
            return 0
        return value

    def layers(name: str, usual: list[int]) -> tuple[int, ...]:
        value = vision.get(name, usual)
        if not (isinstance(value, list) and all(type(item) is int and 0 <= item < depth for item in value)):
            faults.append(f"vision_config.{name} is not a list of layers")
            return ()
        return tuple(value)

    width = number(style.width)
    heads, patch, merge = number("num_heads", 16), number("patch_size", style.patch), number("spatial_merge_size", 2)
    if not faults and (width % heads or width // heads % 4):
        faults.append(f"vision_config: {width} dimensions do not divide into {heads} heads for two axes")
    if number("in_channels" if "in_channels" in vision else "in_chans", 3) != 3:
        faults.append("vision_config: the pictures have not three channels")
    depth = number("depth", 32)
    activation = vision.get("hidden_act", style.activation)
    if activation != style.activation:
        faults.append(f"vision_config.hidden_act is {str(activation)[:40]}")
    own_rope = vision.get("rope_parameters") or {}
    if not isinstance(own_rope, dict) or own_rope.get("rope_theta", THETA) != THETA:
        faults.append(f"vision_config.rope_parameters is not that of the published towers, theta {THETA:g}")
    found = Tower(
        architecture=architecture,
        depth=depth,
        width=width,
        heads=heads,
        inner=width * number("mlp_ratio", 4) if architecture == QWEN2_VL else number("intermediate_size"),
        output=number(style.output),
        patch=patch,
        temporal_patch=number("temporal_patch_size", 2),
        merge=merge,
        window=number(style.window, 112) // merge // patch if style.window else 0,
        full=layers("fullatt_block_indexes", [7, 15, 23, 31]) if style.window else (),
        positions=math.isqrt(number(style.positions, POSITIONS)) if style.positions else 0,
        deepstack=layers(style.deepstack, [8, 16, 24]) if style.deepstack else (),
        sections=_sections(text, style, faults),
        image_token=token("image_token_id"),
        video_token=token("video_token_id"),
        vision_start=token("vision_start_token_id"),
        vision_end=token("vision_end_token_id") if config.get("vision_end_token_id") is not None else None,
        per_second=number("tokens_per_second", PER_SECOND) if style.time == "seconds" else PER_SECOND,
    )
    # what contradicts itself is of use only where each number can be right
    faults = faults or _contradictions(found, vision, text)
    if faults:
        raise UnsupportedModelError(
            f"the vision tower cannot be right: {'; '.join(faults)}",
            where=where,
            hint="use the model's own config.json",
        )
    return found


def _contradictions(tower: Tower, vision: dict[str, Any], text: dict[str, Any]) -> list[str]:
    """What parts of a config say otherwise than other parts."""
    style, stacked, faults = tower.style, list(tower.deepstack), []
    if style.window and tower.window < 1:
        faults.append("vision_config.window_size is smaller than a merged patch")
    if style.positions and vision.get(style.positions, POSITIONS) != tower.positions**2:
        faults.append(f"vision_config.{style.positions} is not the number of places of a square")
    if style.deepstack and (not stacked or stacked != sorted(set(stacked))):
        faults.append(f"vision_config.{style.deepstack} is empty or does not rise")
    if len(stacked) > text.get("num_hidden_layers", 0):
        faults.append(f"vision_config.{style.deepstack} names more layers than the text model has")
    if tower.output != text.get("hidden_size"):
        faults.append(f"the tower gives {tower.output} dimensions, the text model has {text.get('hidden_size')}")
    return faults


def _sections(text: dict[str, Any], style: Style, faults: list[str]) -> tuple[int, ...]:
    """Of the text model's positions; what is wrong goes to ``faults``."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "mrope"):
        faults.append(f"the text model's RoPE is scaled ({str(kind)[:40]}), which is not built beside a tower")
    if rope.get("mrope_interleaved", style.interleaved) is not style.interleaved:
        faults.append("the text model's mrope_interleaved is not that of the published models")
    sections = rope.get("mrope_section")
    if not (isinstance(sections, list) and len(sections) == 3 and all(type(s) is int and s > 0 for s in sections)):
        faults.append("the text model's RoPE has no mrope_section of three numbers")
        return (1, 1, 1)
    return tuple(sections)


@dataclass(frozen=True)
class Preparation:
    """How pictures are prepared, as ``preprocessor_config.json`` says."""

    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def preparation_of(folder: Path, tower: Tower) -> Preparation:
    """Of a checkpoint.

    Raises:
        UnsupportedModelError: it says what no tower can use, or contradicts the tower.
        SourceError: it is missing or damaged.
    """
    told, faults = read_json(folder / PREPROCESSOR), []
    given = told.get("size")
    size: dict[str, Any] = given if isinstance(given, dict) else {}
    least = told.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or FEWEST_PIXELS
    most = told.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or MOST_PIXELS
    if not (type(least) is int and type(most) is int and 1 <= least <= most <= LARGEST_PICTURE):
        faults.append(f"min_pixels and max_pixels are {str(least)[:20]} and {str(most)[:20]}")
    mean, std = sound_normalisation(told, tower, faults)
    if faults:
        raise UnsupportedModelError(
            f"the preparation of pictures cannot be right: {'; '.join(faults)}",
            where=str(folder / PREPROCESSOR),
            hint="use the model's own file",
        )
    return Preparation(least, most, mean, std)


def sound_normalisation(told: dict[str, Any], tower: Tower, faults: list[str]) -> tuple[Three, Three]:
    """Mean and deviation of each channel as a processor's file says; what it cannot say goes to ``faults``."""
    wanted = {"patch_size": tower.patch, "temporal_patch_size": tower.temporal_patch, "merge_size": tower.merge}
    faults += [
        f"{name} is {str(told[name])[:20]}, the tower has {value}"
        for name, value in wanted.items()
        if told.get(name, value) != value
    ]
    triples = [told.get(name, list(usual)) for name, usual in zip(("image_mean", "image_std"), NORMAL, strict=True)]
    for name, triple in zip(("image_mean", "image_std"), triples, strict=True):
        if not (isinstance(triple, list) and len(triple) == 3 and all(_is_share(item) for item in triple)):
            faults.append(f"{name} is not three numbers from 0 to 1")
    if not faults and not all(triples[1]):
        faults.append("image_std has a zero")
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if told.get(name) is False:
            faults.append(f"{name} is false")
    if faults:
        return NORMAL
    (red, green, blue), (red_std, green_std, blue_std) = triples
    return (red, green, blue), (red_std, green_std, blue_std)


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1
