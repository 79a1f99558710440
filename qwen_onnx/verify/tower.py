"""The checkpoint's tower in PyTorch: what an artifact's encoder is measured against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen_onnx.errors import VerificationError
from qwen_onnx.export.drawing import CODES
from qwen_onnx.runtime.engines.media import Medium, Picture, Sound
from qwen_onnx.sources.audio_tower import AUDIO_TOWER_CONFIG
from qwen_onnx.sources.checkpoint import read_json
from qwen_onnx.sources.chunked_tower import ChunkedTower, hearing_tower_of
from qwen_onnx.sources.vision_config import VISION_CONFIG, tower_of
from qwen_onnx.verify.graph import QUANTIZED, Graph, attributes
from qwen_onnx.verify.matrices import Matrix, Packed
from qwen_onnx.verify.softmax import Logits


class Tower(ABC):
    """A tower in fp32; features of media that were encoded stay, since several checks take the same ones.

    Attributes:
        form: what the checkpoint's config says of it.
    """

    form: Any

    def __init__(self) -> None:
        self._kept: dict[str, Logits] = {}

    def features(self, medium: Medium) -> Logits:
        """Of one medium, float32 [tokens, features]: what stands in the text, then what DeepStack adds."""
        import torch

        if medium.digest not in self._kept:
            with torch.inference_mode():
                self._kept[medium.digest] = self._encoded(medium)
        return self._kept[medium.digest]

    @abstractmethod
    def _encoded(self, medium: Any) -> Logits:
        """Without a look at what is kept."""


class VisionTower(Tower):
    """Of a model that sees.

    Raises:
        VerificationError: its weights do not fit.
    """

    def __init__(self, checkpoint: Path, coded: Mapping[str, Matrix] | None = None) -> None:
        super().__init__()
        settings = read_json(checkpoint / VISION_CONFIG)
        self.form = tower_of(settings, str(checkpoint / VISION_CONFIG))
        whole, config = empty_model(settings)
        self.module = _filled(type(whole.visual)(config.vision_config), checkpoint, "visual.", coded)

    def _encoded(self, medium: Picture) -> Logits:
        import torch

        found = self.module(torch.tensor(medium.pixels), torch.tensor([medium.grid]))
        stacked = found.deepstack_features if self.form.deepstack else []
        return np.concatenate([part.numpy() for part in (found.pooler_output, *stacked)], axis=-1)


class AudioTower(Tower):
    """Of a model that hears, with its projection. Raises VerificationError like ``VisionTower``."""

    def __init__(self, checkpoint: Path, coded: Mapping[str, Matrix] | None = None) -> None:
        super().__init__()
        settings = read_json(checkpoint / AUDIO_TOWER_CONFIG)
        self.form = hearing_tower_of(settings, str(checkpoint / AUDIO_TOWER_CONFIG))
        whole, config = empty_model(settings)
        self.module = _filled(type(whole.audio_tower)(config.audio_config), checkpoint, "audio_tower.", coded)
        projector = type(whole.multi_modal_projector)(config)
        self._projector = _filled(projector, checkpoint, "multi_modal_projector.", coded)

    def _encoded(self, medium: Sound) -> Logits:
        """As transformers computes it: for Qwen2-Audio all seconds that fit, with a mask over what is no sound."""
        import torch

        if isinstance(self.form, ChunkedTower):
            there = (torch.arange(medium.mel.shape[1]) < medium.frames).long()[None]
            state = self.module(torch.tensor(medium.mel)[None], input_features_mask=there).last_hidden_state
            return np.asarray(self._projector(state).numpy())
        steps = self.form.positions
        mel = torch.zeros(1, self.form.bands, 2 * steps)
        mel[0, :, : medium.mel.shape[1]] = torch.tensor(medium.mel)
        there = torch.arange(steps) < (medium.frames + 1) // 2
        mask = torch.where(there, 0.0, -torch.inf)[None, None, None]
        state = self.module(mel, attention_mask=mask).last_hidden_state
        return np.asarray(self._projector(state)[0, : medium.tokens].numpy())


def tower_beside(checkpoint: Path, coded: Mapping[str, Matrix] | None = None) -> Tower:
    """Of a checkpoint as ``write_text_form`` writes it; ``coded`` are matrices to have in place of its own, by name."""
    kind = AudioTower if (checkpoint / AUDIO_TOWER_CONFIG).exists() else VisionTower
    return kind(checkpoint, coded)


def coded_matrices(graph: Graph) -> dict[str, Matrix]:
    """Those of an encoder that have fewer bits, by the names of the checkpoint.

    Raises:
        VerificationError: codes, scales or zero points are not there.
    """
    import torch

    found: dict[str, Matrix] = {}
    for node in (node for node in graph.nodes if node.op_type in QUANTIZED):
        told = attributes(node)
        codes, scales, zeros = (torch.tensor(graph.tensor(name)) for name in node.input[1:4])
        found[node.input[1].removesuffix(CODES)] = Packed(codes, scales, zeros, told["bits"], told["K"])
    return found


def empty_model(settings: dict[str, Any]) -> tuple[Any, Any]:
    """The model without weights, and its config."""
    import torch
    import transformers

    config = transformers.CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
    with torch.device("meta"):
        return getattr(transformers, settings["architectures"][0])(config).model, config


def _filled(module: Any, checkpoint: Path, prefix: str, coded: Mapping[str, Matrix] | None) -> Any:
    from qwen_onnx.export.weights import CheckpointWeights

    weights = CheckpointWeights(checkpoint, plain=True)
    stored = weights.tensors(weights.names(prefix))
    stored |= {name: matrix.rows(slice(None)) for name, matrix in (coded or {}).items() if name.startswith(prefix)}
    try:
        module.load_state_dict({name.removeprefix(prefix): tensor.float() for name, tensor in stored.items()})
    except RuntimeError as error:
        raise VerificationError(f"the tower's weights do not fit: {error}", where=str(checkpoint)) from error
    return module.eval()
