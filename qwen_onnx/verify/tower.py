"""The checkpoint's vision tower in PyTorch: what an artifact's encoder is measured against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qwen_onnx.errors import VerificationError
from qwen_onnx.runtime.engines.media import Picture
from qwen_onnx.sources.checkpoint import read_json
from qwen_onnx.sources.vision_config import VISION_CONFIG, tower_of
from qwen_onnx.verify.softmax import Logits


class Tower:
    """A vision tower in fp32; features of pictures that were seen stay, since several checks look at the same ones.

    Args:
        checkpoint: Hugging Face folder.

    Attributes:
        form: what the checkpoint's config says of it.

    Raises:
        VerificationError: its weights do not fit.
    """

    def __init__(self, checkpoint: Path) -> None:
        settings = read_json(checkpoint / VISION_CONFIG)
        self.form = tower_of(settings, str(checkpoint / VISION_CONFIG))
        self._module = _loaded(checkpoint, settings)
        self._seen: dict[str, Logits] = {}

    def features(self, picture: Picture) -> Logits:
        """Of one picture, float32 [tokens, features]: what stands in the text, then what DeepStack adds."""
        import torch

        if picture.digest not in self._seen:
            with torch.inference_mode():
                found = self._module(torch.tensor(picture.pixels), torch.tensor([picture.grid]))
            stacked = found.deepstack_features if self.form.deepstack else []
            parts = [part.numpy() for part in (found.pooler_output, *stacked)]
            self._seen[picture.digest] = np.concatenate(parts, axis=-1)
        return self._seen[picture.digest]


def _loaded(checkpoint: Path, settings: dict[str, Any]) -> Any:
    import torch
    import transformers

    from qwen_onnx.export.weights import CheckpointWeights

    config = transformers.CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
    with torch.device("meta"):
        kind = type(getattr(transformers, settings["architectures"][0])(config).model.visual)
    tower = kind(config.vision_config).eval()
    weights = CheckpointWeights(checkpoint)
    stored = weights.tensors(weights.names("visual."))
    try:
        tower.load_state_dict({name.removeprefix("visual."): tensor.float() for name, tensor in stored.items()})
    except RuntimeError as error:
        raise VerificationError(f"the tower's weights do not fit: {error}", where=str(checkpoint)) from error
    return tower
