"""FP8 checkpoints of Qwen (``weight_scale_inv``, one scale for a block of 128 x 128) in bfloat16, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_onnx.errors import UnsupportedModelError
from qwen_onnx.sources.checkpoint import read_json, shards
from qwen_onnx.sources.quantized import block_of
from qwen_onnx.sources.streamed import BYTES, Stored, read_tensor, tensors_of, write_anew

if TYPE_CHECKING:
    import torch

SCALE = "_scale_inv"
HINT = "use the model's own checkpoint, or one that is not quantised"


def write_bf16_form(checkpoint: Path, folder: Path) -> None:
    """Write ``checkpoint`` to ``folder`` with every matrix in bfloat16 and a config that says so.

    Raises:
        UnsupportedModelError: a scale is missing, has another shape than its blocks, or is not finite.
    """
    block = block_of(read_json(checkpoint / "config.json"))
    if block is None:
        raise UnsupportedModelError("config.json has no weight_block_size", where=str(checkpoint), hint=HINT)
    found = tensors_of(shards(checkpoint))
    _require_scales(found)
    kinds = {
        name: "BF16" if entry.kind == "F8_E4M3" else entry.kind
        for name, entry in found.items()
        if not name.endswith(SCALE)
    }
    write_anew(checkpoint, folder, kinds, lambda name: _tensor(name, found, block), _plain)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    return kept | {"dtype": "bfloat16"}


def _require_scales(found: dict[str, Stored]) -> None:
    for name, entry in found.items():
        if entry.kind not in BYTES:
            raise UnsupportedModelError(f"weights of the type {entry.kind} are not read", where=name, hint=HINT)
        if entry.kind == "F8_E4M3" and name + SCALE not in found:
            raise UnsupportedModelError(f"the weight has no {SCALE[1:]}", where=name, hint=HINT)
        if name.endswith(SCALE) and name.removesuffix(SCALE) not in found:
            raise UnsupportedModelError("a scale belongs to no weight", where=name, hint=HINT)


def _tensor(name: str, found: dict[str, Stored], block: tuple[int, int]) -> torch.Tensor:
    """The tensor as it is, or dequantised."""
    import torch

    weight = read_tensor(name, found)
    if found[name].kind != "F8_E4M3":
        return weight
    scale = read_tensor(name + SCALE, found).float()
    expected = tuple(-(-length // side) for length, side in zip(weight.shape, block, strict=False))
    if weight.dim() != 2 or tuple(scale.shape) != expected:
        what = (
            f"its scales are {list(scale.shape)}, blocks of {list(block)} in {list(weight.shape)} need {list(expected)}"
        )
        raise UnsupportedModelError(what, where=name, hint=HINT)
    rows, columns = weight.shape
    spread = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    made = (weight.float() * spread).to(torch.bfloat16)
    if not bool(torch.isfinite(made).all()):
        raise UnsupportedModelError("weights hold NaN or infinity", where=name, hint="use a sound checkpoint")
    return made
