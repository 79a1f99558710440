"""The checkpoint's vision tower in PyTorch: what an artifact's encoder is measured against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_onnx.errors import VerificationError
from qwen_onnx.runtime.engines.pictures import Picture
from qwen_onnx.sources.checkpoint import read_json
from qwen_onnx.sources.vision_config import VISION_CONFIG
from qwen_onnx.verify.softmax import Logits


class Tower:
    """A vision tower in fp32; features of pictures that were seen stay, since several checks look at the same ones.

    Args:
        checkpoint: Hugging Face folder.

    Raises:
        VerificationError: its weights do not fit.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._module = _loaded(checkpoint)
        self._seen: dict[str, Logits] = {}

    def features(self, picture: Picture) -> Logits:
        """Of one picture, float32 [tokens, hidden]."""
        import torch

        if picture.digest not in self._seen:
            with torch.inference_mode():
                found = self._module(torch.tensor(picture.pixels), torch.tensor([picture.grid]))
            self._seen[picture.digest] = found.pooler_output.numpy()
        return self._seen[picture.digest]


def _loaded(checkpoint: Path) -> Any:
    import torch
    import transformers

    from qwen_onnx.export.weights import CheckpointWeights

    settings = read_json(checkpoint / VISION_CONFIG)
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
