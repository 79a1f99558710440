"""What slots for adapters cost: ``python -m benchmarks.adapters ARTIFACT``, an int4 artifact without slots.

Makes a copy with slots and an adapter of random numbers, for all of them or for ``--targets``. Gives single tokens and
pieces of a prompt in turns to the artifact, to the copy without and with the adapter; slots that the adapter does not
fill are taken out of the copy. Without the adapter a small copy is run by a graph of its own, which has no slots;
``--once`` leaves that out, as for larger ones: the slots are empty then. Prints a table, then one line of JSON; ratios
are to the artifact without slots, brackets hold 95 % bounds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, get_args

import numpy as np

from qwen_onnx.artifact.adapter_file import write_adapter_file
from qwen_onnx.artifact.adapter_slots import Slots
from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.artifact.manifest import read_manifest
from qwen_onnx.catalog.training import Matrix
from qwen_onnx.export.passes.lora_slots.graph import insert_slots
from qwen_onnx.runtime.engines.adapters import AdapterSource
from qwen_onnx.runtime.engines.batch import session
from qwen_onnx.runtime.engines.batch.model import BatchModel
from qwen_onnx.sources.fetch import weights_digest
from qwen_onnx.verify.statistics import median_ratio

PIECE, DECODED, NAME = 64, 8, "random"
Case = tuple[BatchModel, str | None]


def random_adapter(file: Path, slots: Slots, weights: str, targets: Collection[str]) -> Path:
    """An adapter of the slots' whole rank for the matrices ``targets``; its numbers are too small to change much."""
    draw = np.random.default_rng(0).standard_normal
    tensors = {}
    for slot in slots.slots:
        if not {part.matrix for part in slot.parts} & set(targets):
            continue
        columns = slots.rank * len(slot.parts)
        for name, shape in ((slot.a, (slot.inputs, columns)), (slot.b, (columns, slot.outputs))):
            tensors[name] = (draw(shape, np.float32) / 100).astype(np.float32)
    told = {"name": NAME, "base": {"model": "any", "weights": weights}, "rank": slots.rank, "targets": sorted(targets)}
    write_adapter_file(file, tensors, **told, verdict="UNVERIFIED", adapter="0" * 64)
    return file


def cases(artifact: Path, scratch: Path, rank: int, threads: int, targets: Collection[str]) -> dict[str, Case]:
    """The artifact, then the copy without and with the adapter."""
    copy, weights = scratch / "slots", weights_digest(read_manifest(artifact).source.files)
    slots = insert_slots(artifact / GenaiConfig.read(artifact).graph_file, copy, rank)
    source = AdapterSource.of(NAME, random_adapter(scratch / "adapter", slots, weights, targets))
    plain = BatchModel(artifact, rows=1, capacity=256, chunk=PIECE, threads=threads)
    model = BatchModel(copy, rows=1, capacity=256, chunk=PIECE, threads=threads, adapters=[source])
    return {"without slots": (plain, None), "beside an adapter": (model, None), f"rank {rank}": (model, NAME)}


def timed(found: dict[str, Case], rounds: int, clock: Callable[[], float]) -> dict[str, dict[str, list[float]]]:
    """Seconds of a piece of a prompt and of a token, by case."""
    piece, token = np.arange(16, 16 + PIECE)[None], np.array([[16]])
    told: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in found}
    # the first round warms up
    for number in range(rounds + 1):
        for name, (model, adapter) in list(found.items())[:: 1 if number % 2 == 0 else -1]:
            begin = clock()
            model.extend(0, piece, [0], adapter=adapter)
            read = clock()
            for past in range(PIECE, PIECE + DECODED):
                model.extend(0, token, [past], adapter=adapter)
            if number:
                told[name]["prefill"].append(read - begin)
                told[name]["decode"].append((clock() - read) / DECODED)
    return told


def main() -> None:
    """Read the command line, measure, print."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="+", choices=get_args(Matrix), default=list(get_args(Matrix)))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--cpu", action="store_true", help="processor time, for a machine that is busy: with --threads 1"
    )
    parser.add_argument("--once", action="store_true", help="do not load the copy a second time without slots")
    given = parser.parse_args()
    if given.once:
        session.MOST_TWICE = 0
    clock = time.process_time if given.cpu else time.perf_counter
    with tempfile.TemporaryDirectory() as scratch:
        told = timed(
            cases(given.artifact, Path(scratch), given.rank, given.threads, given.targets), given.rounds, clock
        )
    base = next(iter(told.values()))
    table, found = Table("", "decode, ms", "ratio", "64 tokens, ms", "ratio"), {}
    for name, seconds in told.items():
        row: dict[str, Any] = {}
        for kind in ("decode", "prefill"):
            ratio = median_ratio(seconds[kind], base[kind], seed=0)
            row[kind] = {"ms": float(np.median(seconds[kind])) * 1e3, "ratio": [ratio.value, ratio.lower, ratio.upper]}
        found[name] = row
        shown = [(f"{each['ms']:.1f}", "{:.3f} [{:.3f}, {:.3f}]".format(*each["ratio"])) for each in row.values()]
        table.add_row(name, *shown[0], *shown[1])
    Console().print(table)
    print(json.dumps({"threads": given.threads, "clock": "cpu" if given.cpu else "wall", "cases": found}))


if __name__ == "__main__":
    main()
