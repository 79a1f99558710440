"""The audio tower of Qwen2-Audio as a graph for one sound.

transformers computes thirty seconds for every sound and masks what is behind it. Nothing of a sound depends on that
but for the frames that the convolutions see beyond its end, so the graph computes the sound alone: what it costs grows
with the sound, and the scores are left to ONNX Runtime's flash attention, which takes no mask.
"""

from __future__ import annotations

from qwen_onnx.export.drawing import FLOAT, INT64, MICROSOFT, Drawing
from qwen_onnx.sources.audio_tower import AudioTower
from qwen_onnx.sources.chunked_tower import ChunkedTower

MEL, FRAMES, FEATURES = "audio_embeds", "audio_lengths", "audio_features"
EPSILON = 1e-5
KERNEL, STRIDE = 3, 2


def draw_tower(draw: Drawing, tower: AudioTower, kind: int) -> None:
    """The whole encoder: ``MEL`` and ``FRAMES`` to ``FEATURES`` [tokens, output] of type ``kind``."""
    steps = _half(draw, draw.node("Add", FRAMES, draw.integer(1)))
    table = draw.weight("audio_tower.embed_positions.weight", tower.positions, tower.width)
    state = draw.node("Add", first(draw, _convolved(draw, tower), steps), first(draw, table, steps))
    state = layers(draw, tower, state, biased="qv")
    # of an odd number of steps the last has no partner, and no token
    even = draw.node("Mul", _half(draw, steps), draw.integer(2))
    pairs = draw.node("Reshape", first(draw, state, even), draw.integer([-1, 2, tower.width]))
    pooled = draw.node("ReduceMean", pairs, draw.integer([1]), keepdims=0)
    normed = norm(draw, "audio_tower.layer_norm", pooled, tower.width)
    draw.linear("multi_modal_projector.linear", normed, tower.width, tower.output)
    draw.result(FEATURES, kind)


def layers(draw: Drawing, tower: AudioTower | ChunkedTower, state: str, *, biased: str) -> str:
    """Whisper's layers on [steps, width], all of which hear each other; ``biased`` of q, k and v have a bias."""
    for index in range(tower.depth):
        name = f"audio_tower.layers.{index}"
        normed = norm(draw, f"{name}.self_attn_layer_norm", state, tower.width)
        state = draw.node("Add", state, _attention(draw, tower, f"{name}.self_attn", normed, biased))
        normed = norm(draw, f"{name}.final_layer_norm", state, tower.width)
        inner = draw.node("Gelu", draw.linear(f"{name}.fc1", normed, tower.width, tower.inner))
        state = draw.node("Add", state, draw.linear(f"{name}.fc2", inner, tower.inner, tower.width))
    return state


def inputs(tower: AudioTower | ChunkedTower) -> list[tuple[str, int, list[str | int]]]:
    """(name, type, shape) of each input."""
    return [(MEL, FLOAT, [1, tower.bands, "num_frames"]), (FRAMES, INT64, [1])]


def outputs(tower: AudioTower | ChunkedTower, kind: int) -> list[tuple[str, int, list[str | int]]]:
    """(name, type, shape) of the output."""
    return [(FEATURES, kind, ["num_tokens", tower.output])]


def _half(draw: Drawing, value: str) -> str:
    return str(draw.node("Div", value, draw.integer(2)))


def first(draw: Drawing, value: str, count: str) -> str:
    """So many rows."""
    return str(draw.node("Slice", value, draw.integer([0]), count, draw.integer([0])))


def _convolved(draw: Drawing, tower: AudioTower) -> str:
    """[steps, width]."""
    state = MEL
    for name, inner, stride in (("conv1", tower.bands, 1), ("conv2", tower.width, STRIDE)):
        weight = draw.weight(f"audio_tower.{name}.weight", tower.width, inner, KERNEL)
        bias = draw.weight(f"audio_tower.{name}.bias", tower.width)
        made = draw.node("Conv", state, weight, bias, kernel_shape=[KERNEL], pads=[1, 1], strides=[stride])
        state = draw.node("Gelu", made)
    return str(draw.node("Squeeze", draw.node("Transpose", state, perm=[0, 2, 1]), draw.integer([0])))


def norm(draw: Drawing, name: str, value: str, width: int) -> str:
    """PyTorch's LayerNorm on [rows, width]."""
    scale, bias = (draw.weight(f"{name}.{part}", width) for part in ("weight", "bias"))
    return str(draw.node("LayerNormalization", value, scale, bias, axis=-1, epsilon=EPSILON))


def _attention(draw: Drawing, tower: AudioTower | ChunkedTower, name: str, value: str, biased: str) -> str:
    width = tower.width
    parts = [draw.linear(f"{name}.{part}_proj", value, width, width, bias=part in biased) for part in "qkv"]
    batched = [draw.node("Unsqueeze", part, draw.integer([0])) for part in parts]
    heard = draw.node("MultiHeadAttention", *batched, domain=MICROSOFT, num_heads=tower.heads)
    return draw.linear(f"{name}.out_proj", draw.node("Reshape", heard, draw.integer([-1, width])), width, width)
