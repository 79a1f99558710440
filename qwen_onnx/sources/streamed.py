"""A checkpoint written anew, a tensor at a time from the mapped shards, so that memory does not grow with the model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen_onnx.sources.checkpoint import INDEX_FILE, read_json, shards

if TYPE_CHECKING:
    import torch

# safetensors' names of types, and bytes of a number
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
# the header of a safetensors file ends at a multiple of it
ALIGNMENT = 8


class Stored(NamedTuple):
    """A tensor as its shard's header has it."""

    shard: Path
    kind: str
    shape: tuple[int, ...]


def tensors_of(files: Iterable[Path]) -> dict[str, Stored]:
    """Every tensor of these safetensors files by name; raises SafetensorError for a damaged one."""
    from safetensors import safe_open

    found: dict[str, Stored] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                entry = tensors.get_slice(name)
                found[name] = Stored(file, entry.get_dtype(), tuple(entry.get_shape()))
    return found


def read_tensor(name: str, found: Mapping[str, Stored]) -> torch.Tensor:
    """The tensor as it is stored."""
    from safetensors import safe_open

    # opened per tensor: a map that stays open keeps its pages counted
    with safe_open(found[name].shard, framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
    return tensor


def write_anew(
    checkpoint: Path,
    folder: Path,
    kinds: Mapping[str, str],
    tensor: Callable[[str], torch.Tensor],
    config: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Write ``checkpoint`` to ``folder``, shard by shard, with its other files as they are.

    Args:
        kinds: safetensors' type by name, of every tensor that is written; the others are left out.
        tensor: the tensor of a name, in that type and in its stored shape.
        config: the new config.json of the old one.
    """
    found = tensors_of(shards(checkpoint))
    for shard in sorted({entry.shard for entry in found.values()}):
        own = {name: kinds[name] for name, entry in found.items() if entry.shard == shard and name in kinds}
        if own:
            _write_shard(folder / shard.name, own, found, tensor)
    if (checkpoint / INDEX_FILE).exists():
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        names = {name: entry.shard.name for name, entry in found.items() if name in kinds}
        index = {"metadata": {"total_size": size}, "weight_map": names}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")
    for path in checkpoint.iterdir():
        is_other = path.suffix != ".safetensors" and not path.name.startswith(".") and path.name != INDEX_FILE
        if path.is_file() and is_other:
            shutil.copyfile(path, folder / path.name)
    told = json.dumps(config(read_json(checkpoint / "config.json")), indent=1)
    (folder / "config.json").write_text(told, encoding="utf-8")


def write_part(path: Path, names: Iterable[str], found: Mapping[str, Stored]) -> None:
    """Write some of the tensors that are ``found``, as they are, to a safetensors file of their own."""
    _write_shard(path, {name: found[name].kind for name in names}, found, lambda name: read_tensor(name, found))


def _write_shard(
    path: Path, kinds: Mapping[str, str], found: Mapping[str, Stored], tensor: Callable[[str], torch.Tensor]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, kind in kinds.items():
        shape = found[name].shape
        size = BYTES[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in kinds:
            file.write(_bytes(tensor(name)))


def _bytes(tensor: torch.Tensor) -> bytes:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
