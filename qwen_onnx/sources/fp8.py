"""FP8 checkpoints of Qwen (``weight_scale_inv``, one scale for a block of 128 x 128) in bfloat16.

A tensor at a time goes from the mapped shard to the new one, so that memory does not grow with the model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen_onnx.errors import UnsupportedModelError
from qwen_onnx.sources.checkpoint import INDEX_FILE, read_json, shards
from qwen_onnx.sources.quantized import block_of

if TYPE_CHECKING:
    import torch

SCALE = "_scale_inv"
HINT = "use the model's own checkpoint, or one that is not quantised"
# safetensors' names of types, and bytes of a number
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
# the header of a safetensors file ends at a multiple of it
ALIGNMENT = 8


class _Stored(NamedTuple):
    """A tensor as its shard's header has it."""

    shard: Path
    kind: str
    shape: tuple[int, ...]


def write_bf16_form(checkpoint: Path, folder: Path) -> None:
    """Write ``checkpoint`` to ``folder`` with every matrix in bfloat16 and a config that says so.

    Raises:
        UnsupportedModelError: a scale is missing, has another shape than its blocks, or is not finite.
    """
    config = read_json(checkpoint / "config.json")
    block = block_of(config)
    if block is None:
        raise UnsupportedModelError("config.json has no weight_block_size", where=str(checkpoint), hint=HINT)
    found = _headers(checkpoint)
    lost = [name for name in found if name.endswith(SCALE) and name.removesuffix(SCALE) not in found]
    if lost:
        raise UnsupportedModelError("a scale belongs to no weight", where=lost[0], hint=HINT)
    for shard in sorted({entry.shard for entry in found.values()}):
        own = [name for name, entry in found.items() if entry.shard == shard and not name.endswith(SCALE)]
        if own:
            _write_shard(folder / shard.name, own, found, block)
    names = {name: entry.shard.name for name, entry in found.items() if not name.endswith(SCALE)}
    if (checkpoint / INDEX_FILE).exists():
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        index = {"metadata": {"total_size": size}, "weight_map": names}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")
    for path in checkpoint.iterdir():
        if (
            path.is_file()
            and path.suffix != ".safetensors"
            and not path.name.startswith(".")
            and path.name != INDEX_FILE
        ):
            shutil.copyfile(path, folder / path.name)
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    (folder / "config.json").write_text(json.dumps(plain | {"dtype": "bfloat16"}, indent=1), encoding="utf-8")


def _headers(checkpoint: Path) -> dict[str, _Stored]:
    from safetensors import safe_open

    found: dict[str, _Stored] = {}
    for shard in shards(checkpoint):
        with safe_open(shard, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                entry = tensors.get_slice(name)
                found[name] = _Stored(shard, entry.get_dtype(), tuple(entry.get_shape()))
    for name, entry in found.items():
        if entry.kind not in BYTES:
            raise UnsupportedModelError(f"weights of the type {entry.kind} are not read", where=name, hint=HINT)
        if entry.kind == "F8_E4M3" and name + SCALE not in found:
            raise UnsupportedModelError(f"the weight has no {SCALE[1:]}", where=name, hint=HINT)
    return found


def _write_shard(path: Path, names: list[str], found: dict[str, _Stored], block: tuple[int, int]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in names:
        entry = found[name]
        kind = "BF16" if entry.kind == "F8_E4M3" else entry.kind
        size = BYTES[kind]
        for length in entry.shape:
            size *= length
        header[name] = {"dtype": kind, "shape": list(entry.shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(_bytes(_tensor(name, found, block)))


def _tensor(name: str, found: dict[str, _Stored], block: tuple[int, int]) -> torch.Tensor:
    """The tensor as it is, or dequantised."""
    import torch

    weight = _read(name, found)
    if found[name].kind != "F8_E4M3":
        return weight
    scale = _read(name + SCALE, found).float()
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


def _read(name: str, found: dict[str, _Stored]) -> torch.Tensor:
    from safetensors import safe_open

    # opened per tensor: a map that stays open keeps its pages counted
    with safe_open(found[name].shard, framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
    return tensor


def _bytes(tensor: torch.Tensor) -> bytes:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
