"""What stands in the folder of an HTP decoder: ``htp.json``, the host's tables, and graphs in one of three forms."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_onnx.artifact.htp.grid import TOP, Grid
from qwen_onnx.artifact.htp.static_decoder import Cache, Run, StaticDecoder, Tables
from qwen_onnx.errors import ArtifactError, QwenOnnxError

DESCRIPTION = "htp.json"
TABLES = ("embeddings", "cosines", "sines")
FLOAT, QDQ, CONTEXT = "float", "qdq", "context"
SUFFIXES = {FLOAT: ".onnx", QDQ: ".qdq.onnx", CONTEXT: ".onnx"}
MASKED = -1e4  # in float graphs
# bytes of the description, and any size in it; some 30 kB are usual
LARGEST, LARGEST_SIZE = 4 << 20, 1 << 26


def graph_file(tokens: int, form: str) -> str:
    """Name of the graph for windows of ``tokens``; Olive calls the model that a run ends with ``model.onnx``."""
    return ("model" if tokens == 1 else f"window-{tokens}") + SUFFIXES[form]


@dataclass(frozen=True)
class HtpFolder:
    """``htp.json``, read.

    Attributes:
        form: what runs: ``float`` and ``qdq`` on the CPU, ``context`` on the HTP.
        windows: numbers of tokens that there are graphs for, falling; the last one decodes.
        context: most tokens; the cache holds as many.
        grids: by name of graph inputs and outputs; empty in the form ``float``.
    """

    path: Path
    form: str
    windows: tuple[int, ...]
    context: int
    vocabulary: int
    cache: Cache
    grids: Mapping[str, Grid]

    @classmethod
    def read(cls, path: Path, error: type[QwenOnnxError] = ArtifactError) -> HtpFolder:
        """From ``path``.

        Raises:
            error: ``htp.json`` is missing, cannot be read or does not describe such a folder.
        """
        place = path / DESCRIPTION
        hint = "build it again: qwen-onnx optimize"
        if not place.is_file():
            raise error(f"{DESCRIPTION} is missing or not a file", where=str(path), hint=hint)
        try:
            # not by ``bounded``: the environment of onnxruntime-qnn has no pydantic
            with place.open("rb") as file:
                body = file.read(LARGEST + 1)
            if len(body) > LARGEST:
                raise ValueError(f"it has more than {LARGEST:,} bytes")
            return cls._of(path, json.loads(body))
        except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as cause:
            said = f"no {cause}" if isinstance(cause, KeyError) else cause
            raise error(f"{DESCRIPTION} is damaged: {said}", where=str(place), hint=hint) from cause

    @classmethod
    def _of(cls, path: Path, facts: dict[str, Any]) -> HtpFolder:
        grids = {name: Grid(grid["scale"], grid["zero"]) for name, grid in facts.pop("grids").items()}
        windows, cache = tuple(facts.pop("windows")), Cache(**facts.pop("cache"))
        made = cls(path=path, windows=windows, cache=cache, grids=grids, **facts)
        made._check()
        return made

    def _check(self) -> None:
        """ValueError for what no export writes, KeyError for a grid that the host needs."""
        if self.form not in SUFFIXES:
            raise ValueError(f"the form {self.form!r} is unknown")
        sizes = (*self.windows, self.context, self.vocabulary, *vars(self.cache).values())
        if not self.windows or not all(type(size) is int and 0 < size <= LARGEST_SIZE for size in sizes):
            raise ValueError("a size is not a whole number above 0 that a model can have")
        for name, grid in self.grids.items():
            if not (isinstance(grid.scale, float) and math.isfinite(grid.scale) and grid.scale > 0):
                raise ValueError(f"the scale of {name} is not a number above 0")
            if type(grid.zero) is not int or not 0 <= grid.zero <= TOP:
                raise ValueError(f"the zero of {name} is not a code of 16 bits")
        if self.form != FLOAT:
            for name in ("mask", "logits", *(f"past_{kind}" for kind in self._kinds())):
                self.grids[name]

    def _kinds(self) -> list[str]:
        return [f"{kind}.{layer}" for kind in "kv" for layer in range(self.cache.layers)]

    def write(self) -> None:
        """Write ``htp.json``."""
        facts: dict[str, Any] = {
            "form": self.form,
            "windows": list(self.windows),
            "context": self.context,
            "vocabulary": self.vocabulary,
            "cache": vars(self.cache),
            "grids": {name: vars(grid) for name, grid in self.grids.items()},
        }
        (self.path / DESCRIPTION).write_text(json.dumps(facts, indent=1), encoding="utf-8")

    def in_form(self, form: str) -> HtpFolder:
        """The same folder, run in another form."""
        return replace(self, form=form)

    def graph(self, tokens: int) -> Path:
        """The graph that runs windows of ``tokens``."""
        return self.path / graph_file(tokens, self.form)

    def decoder(self, runs: Mapping[int, Run]) -> StaticDecoder:
        """The host's loop around ``runs``, with this folder's tables."""
        embeddings, cosines, sines = (np.load(self.path / f"{name}.npy", mmap_mode="r") for name in TABLES)
        kinds = self._kinds()
        if self.form == FLOAT:
            attended, masked, empty = np.float32(0), np.float32(MASKED), dict.fromkeys(kinds, np.float32(0))
            return StaticDecoder(runs, Tables(embeddings, cosines, sines, attended, masked, empty), self.cache)
        zeros = {name: np.uint16(self.grids[f"past_{name}"].zero) for name in kinds}
        upper = np.uint16(self.grids["mask"].zero)
        return StaticDecoder(runs, Tables(embeddings, cosines, sines, upper, np.uint16(0), zeros), self.cache)

    def numbers(self, logits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Logits as the graph gives them, in float32."""
        found: npt.NDArray[np.float32] = logits if self.form == FLOAT else self.grids["logits"].dequantize(logits)
        return found
