"""Tensors of a checkpoint without loading it, and tensors that live in files instead of anonymous memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qwen_onnx.errors import ExportError
from qwen_onnx.sources.checkpoint import SINGLE_FILE, plain_name, weight_map

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
# safetensors wants the header padded so that the data begin aligned
ALIGNMENT = 64
# rows are converted in pieces of this many weights, which bounds what a conversion holds
PIECE = 1 << 20


class CheckpointWeights:
    """Weights of a safetensors checkpoint, in one file or in shards with an index; reads by memory map.

    Args:
        plain: name weights as they are named where a language model and its tower stand apart.

    Raises:
        ExportError: a shard that the index names is missing.
        SourceError: the index cannot be trusted.
    """

    def __init__(self, folder: Path, *, plain: bool = False) -> None:
        self.folder = folder
        named = weight_map(folder)
        if named is None:
            with safe_open(folder / SINGLE_FILE, framework="pt") as file:
                named = dict.fromkeys(file.keys(), SINGLE_FILE)
        # by what a weight is called here, what its file calls it
        self._stored = {plain_name(name) if plain else name: name for name in named}
        self._files = {name: named[stored] for name, stored in self._stored.items()}
        missing = sorted({name for name in self._files.values() if not (folder / name).exists()})
        if missing:
            raise ExportError(
                f"shards are missing: {', '.join(missing)}", where=str(folder), hint="fetch the checkpoint again"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self, prefix: str = "") -> list[str]:
        """Tensor names that begin with ``prefix``, sorted."""
        return sorted(name for name in self._files if name.startswith(prefix))

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as it is stored, in its own type, backed by the mapped file.

        Raises:
            ExportError: the checkpoint has no such tensor.
        """
        # opened per tensor: a map that stays open would keep its pages counted
        return self.tensors([name])[name]

    def tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Several tensors as they are stored, by name; each shard is mapped once.

        Raises:
            ExportError: the checkpoint lacks one of them.
        """
        by_file: dict[str, dict[str, str]] = {}
        for name in names:
            if name not in self:
                raise ExportError("the checkpoint lacks a weight of its architecture", where=f"{self.folder}: {name}")
            by_file.setdefault(self._files[name], {})[self._stored[name]] = name
        found: dict[str, torch.Tensor] = {}
        for path, members in by_file.items():
            found |= {members[name]: tensor for name, tensor in mapped_safetensors(self.folder / path, members).items()}
        return found

    def fingerprint(self) -> list[list[Any]]:
        """Name of every tensor with the size and time of its file: what tells two checkpoints apart at no cost."""
        stats = {name: (self.folder / name).stat() for name in set(self._files.values())}
        return [[name, stats[file].st_size, stats[file].st_mtime_ns] for name, file in sorted(self._files.items())]


def mapped_safetensors(path: Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file as views of it, by name; all of them unless ``names`` are given."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}


def row_pieces(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows that hold about ``PIECE`` weights each."""
    step = max(PIECE // max(columns, 1), 1)
    yield from (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def mapped(path: Path, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor whose memory is the file ``path``; the file is made, or grown to fit."""
    size = math.prod(shape)
    with path.open("ab") as file:
        file.truncate(max(file.tell(), size * dtype.itemsize))
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).reshape(shape)


def reopened(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """The float32 tensor that an earlier step left in ``path``; to be read only.

    Raises:
        ExportError: the file has another size.
    """
    if path.stat().st_size != 4 * math.prod(shape):
        raise ExportError(f"the file does not hold {list(shape)}", where=str(path), hint="run the command again")
    return mapped(path, shape)


class Scratch:
    """Working tensors in files of one folder; a name that is used again reuses its file.

    The kernel can write such pages back and drop them, so a matrix or a Hessian here is no anonymous memory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def empty(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A float32 tensor, to be filled."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return mapped(self.folder / name, shape)

    def zeros(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A float32 tensor of zeros."""
        return self.empty(name, shape).zero_()

    def float32(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A float32 copy of ``tensor``."""
        return self.empty(name, tuple(tensor.shape)).copy_(tensor)


def create_safetensors(path: Path, layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    """Make a safetensors file of ``layout`` and map its tensors, to be filled in place.

    ``save_file`` of safetensors copies every tensor into memory first.

    Args:
        layout: type and shape by name; types: those of ``DTYPE_NAMES``.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    # wide types first keeps every tensor aligned
    ordered = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
    for name in ordered:
        dtype, shape = layout[name]
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    whole = torch.from_file(str(path), shared=True, size=8 + len(text) + position, dtype=torch.uint8)
    data = whole[8 + len(text) :]
    tensors = {}
    for name in ordered:
        begin, end = header[name]["data_offsets"]
        dtype, shape = layout[name]
        tensors[name] = data[begin:end].view(dtype).reshape(shape)
    return tensors


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write float32 and uint8 tensors to a safetensors file by memory map."""
    files = create_safetensors(path, {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()})
    for name, value in tensors.items():
        files[name].copy_(value)
