"""How much memory and disk a build takes: ``python -m benchmarks.build_memory FOLDER``.

Makes a random checkpoint, runs quantise and graph on it as a product build does, in a child process, and samples the
child's anonymous memory (RssAnon of proc(5): what cannot be dropped and read again) and the disk. Prints a table,
then one line of JSON. Exits 1 when anonymous memory went over the bound: 1.5 GB and the largest tensor in float32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.synthetic import SHARD, Size, write_checkpoint
from qwen_onnx.export.olive import run_olive
from qwen_onnx.files import folder_bytes
from qwen_onnx.processes.progress import listening

BOUND = 1_500_000_000  # bytes, besides the largest tensor in float32
PAUSE = 0.02  # seconds between samples of memory
# few short windows: memory depends on them little, time a lot
QUANTIZE = {
    "type": "CalibratedGptq",
    "group_size": 64,
    "int8_share": 0.3,
    "windows": 4,
    "window": 128,
    "sensitivity_windows": 1,
}
BUILD = {
    "type": "GenAIModelBuilder",
    "precision": "int4",
    "is_symmetric": False,
    "accuracy_level": 4,
    "algo_config": "k_quant",
    "prune_lm_head": True,
}
# as the recipes of mixtures have it: no quantise step, block size and placement are the builder's
MIXTURE = {"block_size": 32, "algo_config": "k_quant_last", "qmoe_block_size": 32}


@dataclass
class Peaks:
    """Highest values seen, in bytes; of anonymous memory and of disk by stage of the build too."""

    anonymous: int = 0
    resident: int = 0
    disk: int = 0
    stages: dict[str, int] = field(default_factory=dict)
    disk_stages: dict[str, int] = field(default_factory=dict)


class Sampler:
    """Samples all child processes of this one, and the size of ``folder``, until it is left.

    Set ``stage`` to say what is going on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.peaks, self.stage = folder, Peaks(), "start"
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._memory, self._disk)]

    def __enter__(self) -> Sampler:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _memory(self) -> None:
        own = psutil.Process()
        while not self._ended.wait(PAUSE):
            figures = [memory_of(child.pid) for child in own.children(recursive=True)]
            anonymous = sum(figure["RssAnon"] for figure in figures)
            self.peaks.anonymous = max(self.peaks.anonymous, anonymous)
            self.peaks.resident = max(self.peaks.resident, sum(figure["VmRSS"] for figure in figures))
            self.peaks.stages[self.stage] = max(self.peaks.stages.get(self.stage, 0), anonymous)

    def _disk(self) -> None:
        while not self._ended.wait(20 * PAUSE):
            used = disk_usage(self.folder)
            self.peaks.disk = max(self.peaks.disk, used)
            self.peaks.disk_stages[self.stage] = max(self.peaks.disk_stages.get(self.stage, 0), used)


def memory_of(process: int) -> dict[str, int]:
    """``RssAnon`` and ``VmRSS`` of a process in bytes, from proc(5); zeros when it is gone."""
    found = {"RssAnon": 0, "VmRSS": 0}
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return found
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) * 1024
    return found


def disk_usage(folder: Path) -> int:
    """Bytes of the blocks of all files below ``folder``; a file with two names counts once."""
    seen: dict[int, int] = {}
    for path in folder.rglob("*"):
        try:
            state = path.lstat()
        except FileNotFoundError:
            continue
        seen[state.st_ino] = state.st_blocks * 512
    return sum(seen.values())


def measure(checkpoint: Path, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Run an Olive config on a checkpoint in a child process as ``optimize`` does, below ``folder``.

    Returns:
        ``artifact_bytes``; ``anonymous_bytes``, ``resident_bytes``, ``disk_bytes`` (peaks, the checkpoint not
        counted); ``stages``, ``disk_stages``: anonymous and disk bytes by stage; ``seconds``. What was built is
        removed.
    """
    work, kept = folder / "build/work", folder / "build/kept"
    kept.mkdir(parents=True)
    begin = time.monotonic()
    with Sampler(folder / "build") as sampler:

        def said(line: str) -> None:
            print(f"› {line}", file=sys.stderr, flush=True)
            sampler.stage = _stage(line, sampler.stage)

        with listening(said):
            model = run_olive(config, checkpoint, work, folder / "build.log", kept)
    seconds = time.monotonic() - begin
    (model / "model_config.json").unlink()
    artifact = folder_bytes(model)
    shutil.rmtree(folder / "build")
    return {
        "artifact_bytes": artifact,
        "anonymous_bytes": sampler.peaks.anonymous,
        "resident_bytes": sampler.peaks.resident,
        "disk_bytes": sampler.peaks.disk,
        "stages": sampler.peaks.stages,
        "disk_stages": sampler.peaks.disk_stages,
        "seconds": round(seconds, 1),
    }


def measure_random(folder: Path, size: Size, quantize: dict[str, Any], *, shard: int = SHARD) -> dict[str, Any]:
    """``measure`` on a random checkpoint of ``size`` that is made and removed again.

    Returns:
        The figures of ``measure``, ``checkpoint_bytes`` and ``bound_bytes``.
    """
    checkpoint = folder / "checkpoint"
    weights = write_checkpoint(checkpoint, size, shard=shard)
    found = measure(checkpoint, folder, olive_config(size, quantize))
    shutil.rmtree(checkpoint)
    return {"checkpoint_bytes": weights, **found, "bound_bytes": BOUND + 4 * size.largest}


def olive_config(size: Size, quantize: dict[str, Any]) -> dict[str, Any]:
    """The run that is measured: quantise with the options ``quantize``, then the INT4 graph for the CPU.

    A mixture of experts is quantised by genai's builder.
    """
    dense = {"quantize": {**QUANTIZE, **quantize}, "build": BUILD}
    return {
        "input_model": {"type": "HfModel", "model_path": "checkpoint"},
        "passes": {"build": BUILD | MIXTURE} if size.experts else dense,
        "evaluate_input_model": False,
        "cache_dir": "cache",
        "output_dir": "model",
        "log_severity_level": 1,
    }


def _stage(line: str, before: str) -> str:
    """Which stage a line of progress belongs to."""
    stages = {
        "sensitivity": "sensitivity",
        "quantised layer": "quantise",
        "Olive: build": "graph",
        "packed the experts": "experts",
        "quantised the matrices": "matrices",
    }
    return next((stage for begin, stage in stages.items() if line.startswith(begin)), before)


def main() -> int:
    """Read the command line, measure, print."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m benchmarks.build_memory", description=__doc__)
    parser.add_argument("folder", type=Path, help="scratch folder; needs about twice the checkpoint's size")
    for item in fields(Size):
        parser.add_argument(f"--{item.name.replace('_', '-')}", type=int, default=item.default)
    given = vars(parser.parse_args())
    folder = given.pop("folder").resolve()
    size = replace(Size(), **given)
    found = measure_random(folder, size, {})
    table = Table("figure", "GB")
    for name, value in found.items():
        if name.endswith("_bytes"):
            table.add_row(name.removesuffix("_bytes"), f"{value / 1e9:.3f}")
    for kind, stages in (("anonymous", found["stages"]), ("disk", found["disk_stages"])):
        for stage, value in stages.items():
            table.add_row(f"{kind}, {stage}", f"{value / 1e9:.3f}")
    table.add_row("seconds", str(found["seconds"]))
    Console().print(table)
    within = found["anonymous_bytes"] <= found["bound_bytes"]
    print(json.dumps({"size": asdict(size), **found, "within_bound": within}))
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
