"""The audio tower in PyTorch: Qwen2-Audio's, with its names of weights, for a batch of sounds cut at the longest.

transformers fills every sound up to ``chunk_length`` seconds; what is behind a sound is masked here as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.starter_audio.sounds import SETTINGS

DEPTH, WIDTH, HEADS, INNER, OUTPUT = 4, 128, 4, 512, 576
POSITIONS = SETTINGS.frames // 2
# classes of a token: nothing, and the ten digits
NOTHING, SAID = 0, 11
TOWER, PROJECTOR = "audio_tower.", "multi_modal_projector."


def audio_config() -> dict[str, Any]:
    """``audio_config`` of ``config.json``."""
    return {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": SETTINGS.feature_size,
        "encoder_layers": DEPTH,
        "encoder_attention_heads": HEADS,
        "encoder_ffn_dim": INNER,
        "d_model": WIDTH,
        "max_source_positions": POSITIONS,
        "activation_function": "gelu",
        "scale_embedding": False,
    }


class Attention(nn.Module):
    """All steps of a sound hear one another."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.q_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, value: Tensor, mask: Tensor) -> Tensor:
        """[sounds, steps, width]; ``mask`` [sounds, 1, 1, steps] is true where there is sound."""
        query, key, values = (
            layer(value).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        found = nn.functional.scaled_dot_product_attention(query, key, values, attn_mask=mask)
        answer: Tensor = self.out_proj(found.transpose(1, 2).flatten(2))
        return answer


class Layer(nn.Module):
    """One of Whisper's encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, value: Tensor, mask: Tensor) -> Tensor:
        """[sounds, steps, width]."""
        value = value + self.self_attn(self.self_attn_layer_norm(value), mask)
        inner = nn.functional.gelu(self.fc1(self.final_layer_norm(value)))
        found: Tensor = value + self.fc2(inner)
        return found


class AudioTower(nn.Module):
    """Spectrograms [sounds, bands, frames] to what the projector gets, [sounds, tokens, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(SETTINGS.feature_size, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(POSITIONS, WIDTH)
        self.layers = nn.ModuleList([Layer() for _ in range(DEPTH)])
        self.layer_norm = nn.LayerNorm(WIDTH)
        with torch.no_grad():
            self.embed_positions.weight.copy_(_waves())

    def forward(self, mel: Tensor, frames: Tensor) -> Tensor:
        """``frames`` [sounds] are of each; tokens behind those of a sound mean nothing."""
        state = nn.functional.gelu(self.conv1(mel))
        state = nn.functional.gelu(self.conv2(state)).transpose(1, 2)
        steps = state.shape[1]
        state = state + self.embed_positions.weight[:steps]
        mask = torch.arange(steps) < ((frames + 1) // 2)[:, None]
        for layer in self.layers:
            state = layer(state, mask[:, None, None])
        pairs = state[:, : steps // 2 * 2].reshape(len(state), -1, 2, WIDTH).mean(2)
        found: Tensor = self.layer_norm(pairs)
        return found


class Learner(nn.Module):
    """The tower and a head, which becomes a part of the projector."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.says = AudioTower(), nn.Linear(WIDTH, SAID)

    def forward(self, mel: Tensor, frames: Tensor) -> Tensor:
        """[sounds, tokens, SAID], about ones and zeros."""
        found: Tensor = self.says(self.tower(mel, frames))
        return found


def heard(classes: Sequence[int]) -> tuple[int, ...]:
    """The digits that tokens say: of those that last, one, as CTC reads them."""
    once = [one for one, before in zip(classes, [NOTHING, *classes], strict=False) if one != before]
    return tuple(one - 1 for one in once if one != NOTHING)


def peaks(says: Tensor) -> Tensor:
    """[tokens] classes, of a digit that lasts the most certain token alone."""
    classes, certain = says.argmax(-1), says.amax(-1)
    found, begin = torch.zeros_like(classes), 0
    for end in range(1, len(classes) + 1):
        if end == len(classes) or classes[end] != classes[begin]:
            found[begin + int(certain[begin:end].argmax())] = classes[begin]
            begin = end
    return found


def tokens_of(frames: Tensor) -> Tensor:
    """How many tokens sounds of so many frames have."""
    return (frames + 1) // 2 // 2


def weights(tower: AudioTower, projector: nn.Linear) -> dict[str, Tensor]:
    """Of a checkpoint, in half precision."""
    found = {f"{TOWER}{name}": tensor for name, tensor in tower.state_dict().items()}
    found |= {f"{PROJECTOR}linear.{name}": tensor for name, tensor in projector.state_dict().items()}
    return {name: tensor.to(torch.float16).contiguous() for name, tensor in found.items()}


def _waves() -> Tensor:
    """Whisper's sines of positions, which learn here."""
    rates = 10_000.0 ** (-torch.arange(WIDTH // 2) / (WIDTH // 2 - 1))
    angles = torch.arange(POSITIONS)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1) * 0.3
