"""The vision tower in PyTorch: Qwen2.5-VL's, for batches of pictures of one size, with its names of weights.

transformers' own attends picture by picture in a loop, which would take most of the time of a tower this small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from training.starter_vl.scenes import GRID

DEPTH, WIDTH, HEADS, INNER, OUTPUT = 4, 128, 4, 256, 576
PATCH, MERGE, FRAMES, CHANNELS = 14, 2, 2, 3
SIDE = GRID * MERGE * PATCH
THETA = 10000.0


def vision_config() -> dict[str, Any]:
    """``vision_config`` of ``config.json``."""
    return {
        "model_type": "qwen2_5_vl",
        "depth": DEPTH,
        "hidden_size": WIDTH,
        "num_heads": HEADS,
        "intermediate_size": INNER,
        "out_hidden_size": OUTPUT,
        "hidden_act": "silu",
        "in_channels": CHANNELS,
        "patch_size": PATCH,
        "temporal_patch_size": FRAMES,
        "spatial_merge_size": MERGE,
        "window_size": 112,
        "fullatt_block_indexes": list(range(DEPTH)),
        "tokens_per_second": 2,
    }


def turns() -> tuple[Tensor, Tensor]:
    """Cosine and sine [patches, head] of the rotary embedding of row and column, patches in the processor's order."""
    quarter = WIDTH // HEADS // 4
    rates = 1.0 / THETA ** (torch.arange(quarter, dtype=torch.float32) / quarter)
    cells = [(y, x) for y in range(GRID) for x in range(GRID)]
    axes = torch.tensor(
        [[y * MERGE + a, x * MERGE + b] for y, x in cells for a in range(MERGE) for b in range(MERGE)]
    ).float()
    angles = (axes[:, :, None] * rates).flatten(1)
    doubled = torch.cat((angles, angles), dim=-1)
    return doubled.cos(), doubled.sin()


def _turned(value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = value.chunk(2, dim=-1)
    return value * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """All patches of a picture see one another."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[pictures, patches, width]."""
        pictures, patches, _ = value.shape
        query, key, values = self.qkv(value).view(pictures, patches, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(_turned(query, cos, sin), _turned(key, cos, sin), values)
        answer: Tensor = self.proj(seen.transpose(1, 2).reshape(pictures, patches, WIDTH))
        return answer


class Gated(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down_proj = nn.Linear(INNER, WIDTH)

    def forward(self, value: Tensor) -> Tensor:
        """[…, width]."""
        answer: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(value)) * self.up_proj(value))
        return answer


class Block(nn.Module):
    """A layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
        self.attn, self.mlp = Attention(), Gated()

    def forward(self, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[pictures, patches, width]."""
        value = value + self.attn(self.norm1(value), cos, sin)
        found: Tensor = value + self.mlp(self.norm2(value))
        return found


class Merger(nn.Module):
    """Four patches become a token of the language model."""

    def __init__(self) -> None:
        super().__init__()
        joined = WIDTH * MERGE**2
        self.ln_q = nn.RMSNorm(WIDTH, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(joined, joined), nn.GELU(), nn.Linear(joined, OUTPUT))

    def inner(self, value: Tensor) -> Tensor:
        """What the last matrix gets."""
        pictures = len(value)
        found: Tensor = self.mlp[1](self.mlp[0](self.ln_q(value).view(pictures, GRID**2, -1)))
        return found


class VisionTower(nn.Module):
    """Pixels [pictures, patches, channels · patch²] of one frame to features [pictures, tokens, OUTPUT]."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(CHANNELS * PATCH**2, WIDTH, bias=False)})
        self.blocks = nn.ModuleList([Block() for _ in range(DEPTH)])
        self.merger = Merger()
        cos, sin = turns()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def inner(self, pixels: Tensor) -> Tensor:
        """What the merger's last matrix gets, [pictures, tokens, width · merge²]."""
        state = self.patch_embed["proj"](pixels)
        for block in self.blocks:
            state = block(state, self.cos, self.sin)
        return self.merger.inner(state)

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        features: Tensor = self.merger.mlp[2](self.inner(pixels))
        return features


def weights(tower: VisionTower) -> dict[str, Tensor]:
    """Of a checkpoint, in half precision: a picture's two frames are the same, and share what one had."""
    found = {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
    one = found["visual.patch_embed.proj.weight"].view(WIDTH, CHANNELS, 1, PATCH, PATCH)
    found["visual.patch_embed.proj.weight"] = one.expand(-1, -1, FRAMES, -1, -1) / FRAMES
    return {name: tensor.to(torch.float16).contiguous() for name, tensor in found.items()}
