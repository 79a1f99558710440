"""Steps with keys and values in int8 and in float32, in turns: ``python -m benchmarks.kv_cache ARTIFACT``.

Both graphs of a CPU artifact read a text of random tokens up to each depth. Then each step is taken by one and by the
other, in the order of a round (ABBA). The scales are those of that text: speed does not depend on them.

* ``decode_R_behind_D_ratio``: tokens per second of R rows, each with D tokens, int8 over float32; ``..._tok_s`` and
  ``..._float_tok_s`` are the speeds themselves, all rows together.
* ``prefill_behind_D_ratio`` and so on: 64 tokens of one row.
* ``kv_token_bytes`` and ``kv_token_float_bytes``, before the figures: memory of a token in a row.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.figures import Bound, Figure, conclude
from qwen_onnx.artifact.kv_scales import scales_of
from qwen_onnx.errors import ConfigError, run
from qwen_onnx.runtime.engines.batch.model import BatchModel
from qwen_onnx.runtime.engines.batch.steps import PREFILL_CHUNK
from qwen_onnx.runtime.engines.genai import Shape
from qwen_onnx.verify.kv_cache import reach

MOST_ROWS, TOKEN = 4, 16
FLOAT, INT8 = "float", "int8"


@dataclass(frozen=True)
class Options:
    """How much is measured; ``tokens`` are those that each row decodes in a round."""

    depths: tuple[int, ...] = (64, 512, 4096)
    rows: tuple[int, ...] = (1, MOST_ROWS)
    tokens: int = 8
    rounds: int = 12
    threads: int | None = None
    clock: Callable[[], float] = time.perf_counter


class Bench:
    """Two graphs of one artifact; ``values`` holds one entry a round for each figure."""

    def __init__(self, folder: Path, options: Options) -> None:
        self._options = options
        room = max(options.depths) + max(PREFILL_CHUNK, options.tokens)
        context = Shape.read(folder).context_length
        if room > context:
            raise ConfigError([f"--depths: the model's context holds {context} tokens, {room} are needed"])
        self._ids = np.random.default_rng(0).integers(TOKEN, Shape.read(folder).vocab_size // 2, (1, room))
        sizes: dict[str, Any] = {"rows": max(options.rows), "capacity": room, "chunk": PREFILL_CHUNK}
        plain = BatchModel(folder, threads=options.threads, **sizes)
        self._filled = 0
        self._models = {FLOAT: plain}
        self._read(min(options.depths))
        scales = scales_of(reach(plain.held(0, self._filled)))
        self._filled = 0
        self._models[INT8] = BatchModel(folder, threads=options.threads, kv_scales=lambda _: scales, **sizes)
        self.values: dict[str, list[float]] = defaultdict(list)

    def bytes_per_token(self) -> dict[str, int]:
        """Of one row, by model."""
        return {name: model.kv_bytes_per_token for name, model in self._models.items()}

    def _read(self, depth: int) -> None:
        """Every row of both holds the text's first ``depth`` tokens: pages that were never written cost nothing."""
        for model in self._models.values():
            for begin in range(self._filled, depth, PREFILL_CHUNK):
                model.extend(0, self._ids[:, begin : min(begin + PREFILL_CHUNK, depth)], [begin])
            for row in range(1, model.rows):
                model.copy(0, row, depth)
        self._filled = depth

    def all_rounds(self, say: Callable[[str], None]) -> None:
        """Depth after depth; the first round warms up."""
        for depth in sorted(self._options.depths):
            say(f"reading {depth} tokens")
            self._read(depth)
            for number in range(self._options.rounds + 1):
                found = self._round(depth, [FLOAT, INT8] if number % 2 else [INT8, FLOAT])
                for kind, (tokens, seconds) in found.items() if number else ():
                    self._note(kind, tokens, seconds)

    def _round(self, depth: int, order: Sequence[str]) -> dict[str, tuple[int, dict[str, float]]]:
        """Tokens and seconds of each model, by kind of step; what rows hold behind ``depth`` is written over."""
        told: dict[str, tuple[int, dict[str, float]]] = {}
        piece = self._ids[:, depth : depth + PREFILL_CHUNK]
        told[f"prefill_behind_{depth}"] = PREFILL_CHUNK, {name: self._timed(name, [(piece, depth)]) for name in order}
        for rows in self._options.rows:
            column = np.full((rows, 1), TOKEN, np.int64)
            steps = [(column, depth + index) for index in range(self._options.tokens)]
            seconds = {name: self._timed(name, steps) for name in order}
            told[f"decode_{rows}_behind_{depth}"] = rows * len(steps), seconds
        return told

    def _timed(self, name: str, steps: Sequence[tuple[np.ndarray[Any, Any], int]]) -> float:
        begin = self._options.clock()
        for tokens, past in steps:
            self._models[name].extend(0, tokens, [past] * len(tokens))
        return self._options.clock() - begin

    def _note(self, kind: str, tokens: int, seconds: dict[str, float]) -> None:
        self.values[f"{kind}_ratio"].append(seconds[FLOAT] / seconds[INT8])
        self.values[f"{kind}_tok_s"].append(tokens / seconds[INT8])
        self.values[f"{kind}_float_tok_s"].append(tokens / seconds[FLOAT])


def benchmark(folder: Path, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure an artifact.

    Returns:
        ``head``: where and how; ``figures``: name to ``Figure`` or None; names as in the module's docstring.

    Raises:
        ArtifactError: it does not load, or can have no int8 cache. ConfigError: a depth that its context does not hold.
    """
    bench = Bench(folder, options)
    bench.all_rounds(say)
    sizes = bench.bytes_per_token()
    head = {
        "artifact": folder.name,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "threads": options.threads,
        "clock": "wall" if options.clock is time.perf_counter else "cpu",
        "rounds": options.rounds,
        "kv_token_bytes": sizes[INT8],
        "kv_token_float_bytes": sizes[FLOAT],
    }
    return {"head": head, "figures": {name: Figure.of(values) for name, values in bench.values.items()}}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 when a bound is broken."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kv_cache", description="steps with keys and values in int8 and in float32, in turns"
    )
    default = Options()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=default.depths, help="tokens before the step")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="an even number takes each order as often")
    parser.add_argument("--threads", type=int, help="of onnxruntime")
    parser.add_argument(
        "--cpu", action="store_true", help="processor time, for a machine that is busy: with --threads 1"
    )
    parser.add_argument("--gate", action="append", default=[], metavar="NAME>=VALUE", help="exit 1 when it is broken")
    given = parser.parse_args(arguments)
    bounds = [Bound.parse(text) for text in given.gate]
    clock = time.process_time if given.cpu else time.perf_counter
    options = Options(tuple(given.depths), rounds=given.rounds, threads=given.threads, clock=clock)
    told = benchmark(given.artifact.resolve(), options, Console(stderr=True).print)
    return conclude(told, f"{told['head']['artifact']}, keys and values in int8", bounds)


if __name__ == "__main__":
    run(main)
