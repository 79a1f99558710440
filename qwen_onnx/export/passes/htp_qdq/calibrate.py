"""Ranges of every tensor of an HTP graph, from running it in float on calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_onnx.artifact.htp.cpu import cpu_session
from qwen_onnx.artifact.htp.folder import MASKED
from qwen_onnx.artifact.htp.grid import Grid
from qwen_onnx.artifact.htp.static_decoder import Cache, StaticDecoder, Tables
from qwen_onnx.export.passes.htp_qdq.decoder import COSINES, EMBEDDINGS, MASK, SINES, Decoder, Sizes
from qwen_onnx.export.passes.htp_qdq.linears import Linears
from qwen_onnx.export.passes.htp_qdq.writer import DataFile, FloatWriter
from qwen_onnx.export.progress import Steps

# A masked score saturates at so much below the least score: each has e^-20 of the weight of any that is attended
MARGIN = 20.0
# Ranges are so much wider than what calibration saw: it costs half a bit of sixteen, and what saturates costs more
HEADROOM = 1.5
LOW, HIGH = "ReduceMin:", "ReduceMax:"
# results of these lie between 0 and 1
PROBABILITIES = (".probabilities", ".sigmoid")
MASKED_SCORES = ".masked"
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FloatTables:
    """Embeddings [vocabulary, hidden] and rotary tables [context, head_dim] of a checkpoint."""

    embeddings: Floats
    cosines: Floats
    sines: Floats

    @classmethod
    def of(cls, linears: Linears, context: int) -> FloatTables:
        """Read the embeddings; compute the rotary tables as transformers does, the lower half of the sines negated."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(linears.folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        rotary = type(model.model.rotary_emb)(config=config)
        with torch.no_grad():
            cosines, sines = (table[0].numpy() for table in rotary(torch.zeros(1), torch.arange(context)[None]))
        half = sines.shape[1] // 2
        sines = np.concatenate([-sines[:, :half], sines[:, half:]], axis=1)
        return cls(linears.array("model.embed_tokens.weight"), cosines, sines)


def cache_of(sizes: Sizes) -> Cache:
    """The cache that a graph of ``sizes`` takes."""
    return Cache(sizes.layers, sizes.kv_heads, sizes.cache, sizes.head_dim)


def float_decoder(linears: Linears, sizes: Sizes, tables: FloatTables, folder: Path, *, threads: int) -> FloatDecoder:
    """Write the float graph to ``folder`` and load it on the CPU."""
    import onnx

    writer = FloatWriter(DataFile(folder / "float.data"))
    onnx.save(Decoder(writer, linears, sizes).write(), str(folder / "float.onnx"))
    return FloatDecoder(folder / "float.onnx", sizes, tables, threads)


class FloatDecoder:
    """The float graph on the CPU; remembers the least and greatest number of every tensor."""

    def __init__(self, model: Path, sizes: Sizes, tables: FloatTables, threads: int) -> None:
        self.low: dict[str, float] = {}
        self.high: dict[str, float] = {}
        self._run = cpu_session(model, threads)
        zero = np.float32(0)
        empty = {f"{kind}.{layer}": zero for kind in "kv" for layer in range(sizes.layers)}
        host = Tables(tables.embeddings, tables.cosines, tables.sines, zero, np.float32(MASKED), empty)
        self.decoder = StaticDecoder({sizes.tokens: self._observed}, host, cache_of(sizes))
        self._tokens = sizes.tokens

    def logits(self, ids: Sequence[int]) -> Floats:
        """[tokens, vocabulary] of a text from its beginning."""
        self.decoder.reset()
        logits: Floats = self.decoder.feed(ids, self._tokens)
        return logits

    def _observed(self, feeds: dict[str, Any]) -> dict[str, Any]:
        outputs = dict(self._run(feeds))
        for name, value in outputs.items():
            if name.startswith(LOW):
                key = name.removeprefix(LOW)
                self.low[key] = min(self.low.get(key, 0.0), float(value))
            elif name.startswith(HIGH):
                key = name.removeprefix(HIGH)
                self.high[key] = max(self.high.get(key, 0.0), float(value))
        return outputs


def calibrated_grids(decoder: FloatDecoder, windows: Sequence[Sequence[int]], tables: FloatTables) -> dict[str, Grid]:
    """The grid of every key, from the ranges that the float graph shows on ``windows`` of token ids."""
    steps = Steps("calibrated window", len(windows))
    for number, ids in enumerate(windows, 1):
        decoder.logits(ids)
        steps.step(number)
    low, high = ({key: HEADROOM * value for key, value in seen.items()} for seen in (decoder.low, decoder.high))
    grids = {key: Grid.spanning(low[key], high[key]) for key in low}
    spans = [high[key] - low[key] for key in low if key.endswith(".scores")]
    for key in low:
        scores = key.removesuffix(MASKED_SCORES) + ".scores"
        if key.endswith(PROBABILITIES):
            grids[key] = Grid.spanning(0.0, 1.0)
        elif key.endswith(MASKED_SCORES):
            grids[key] = Grid.spanning(low[scores] - MARGIN, high[scores])
        elif key.endswith((".k.rotated", ".v_proj.out")):
            # the second operand of a product of two tensors: the HTP converts it to a symmetric grid otherwise
            grids[key] = Grid.spanning(low[key], high[key], symmetric=True)
    for name, table in ((EMBEDDINGS, tables.embeddings), (COSINES, tables.cosines), (SINES, tables.sines)):
        grids[name] = Grid.spanning(float(table.min()), float(table.max()))
    grids[MASK] = Grid.spanning(-(max(spans) + MARGIN), 0.0)
    return grids
