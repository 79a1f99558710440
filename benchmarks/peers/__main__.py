"""An artifact beside its peers on the same checkpoint: ``python -m benchmarks.peers ARTIFACT CHECKPOINT``.

Converts the checkpoint for llama.cpp (GGUF) and for OpenVINO GenAI (int4), then measures each model's drift from
PyTorch in float32 on the verification's own texts, its size, speed, memory and time to load. Every model runs in a
process of its own, with one count of threads for all, and they take turns in the order A B C, C B A. ``control`` is a
second process of the artifact: what it differs from the first is noise. Prints tables, then one line of JSON, and
writes both plots and the line to ``--output``.

llama.cpp comes with the extra ``bench``; OpenVINO GenAI gets an environment of its own, made below the cache when first
asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.peers import measure
from benchmarks.peers.measure import CONTROL, STREAM_PROMPT, Condition, Measured, conditions_of
from benchmarks.peers.models import PEERS, Interpreters, models
from benchmarks.peers.show import records, show, svgs
from qwen_onnx.catalog.load import work_root
from qwen_onnx.errors import ConfigError, run
from qwen_onnx.processes.progress import listening
from qwen_onnx.runtime.engines.genai import Shape
from qwen_onnx.sources.checkpoint import read_json
from qwen_onnx.sources.fetch import cache_root
from qwen_onnx.verify.records import VerifyOptions

CHECKS = ("kld", "speed")
DEPTHS, STREAMS = (64, 512, 4096), (1, 4, 8)
DEFAULT_PEERS = ("llama-q4_k_m", "llama-q8_0", "openvino-int4")
PLOTTED = 512  # depth of the prompt behind which the plotted speed is measured, or the deepest there is


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        ConfigError: with every fault of its values.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("checkpoint", type=Path, help="that the artifact was built of")
    parser.add_argument("--peers", nargs="*", default=DEFAULT_PEERS, metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--checks", default=",".join(CHECKS), help="kld, speed, or both with a comma")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help="tokens before those that are decoded")
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS, help=f"at {STREAM_PROMPT} tokens each")
    parser.add_argument("--new-tokens", type=int, default=64, help="decoded behind each prompt")
    parser.add_argument("--threads", type=int, default=2, help="of every engine")
    parser.add_argument(
        "--python", action="append", default=[], metavar="BACKEND=PYTHON", help="one that has the packages of a peer"
    )
    parser.add_argument("--output", type=Path, default=Path("artifacts/peers"), help="folder of plots and JSON")
    given = parser.parse_args(arguments)
    faults = [f"--checks: no check {name!r}; there are {', '.join(CHECKS)}" for name in _unknown(given.checks)]
    least = {"--rounds": [given.rounds], "--threads": [given.threads], "--depths": given.depths}
    least["--streams"] = given.streams
    faults += [f"{option}: {value} is less than 1" for option, values in least.items() for value in values if value < 1]
    if given.new_tokens < 2:
        faults.append(f"--new-tokens: {given.new_tokens} is less than 2, which a speed takes")
    faults += [f"--python: {text!r} is not BACKEND=PYTHON" for text in given.python if not all(text.partition("="))]
    if faults:
        raise ConfigError(faults, hint="python -m benchmarks.peers --help")
    return given


def _unknown(checks: str) -> list[str]:
    return [name for name in checks.split(",") if name not in CHECKS]


def fitting(conditions: Sequence[Condition], new_tokens: int, context: int) -> tuple[list[Condition], list[Condition]]:
    """Those that ``context`` tokens hold, prompt and answer, and those that they do not."""
    fits = [each for each in conditions if each.depth + new_tokens <= context]
    return fits, [each for each in conditions if each not in fits]


def measured(given: argparse.Namespace, console: Console) -> tuple[dict[str, Any], list[Condition]]:
    """Everything: the record for JSON, and the conditions of its speeds."""
    artifact, checkpoint = given.artifact.resolve(), given.checkpoint.resolve()
    context = min(Shape.read(artifact).context_length, _positions(checkpoint))
    conditions, too_deep = fitting(conditions_of(given.depths, given.streams), given.new_tokens, context)
    for condition in too_deep:
        console.print(f"not measured: {condition.depth} tokens, which the context of {context} does not hold")
    cache, checks = cache_root(work_root()), given.checks.split(",")
    interpreters = Interpreters({name: Path(path) for name, _, path in map(_halves, given.python)}, cache)
    chosen = models(artifact, checkpoint, given.peers, interpreters, cache / "peers", given.threads)
    found = {name: Measured() for name in (*(model.name for model in chosen), CONTROL)}
    options = VerifyOptions(threads=given.threads)
    with tempfile.TemporaryDirectory(prefix="qwen-onnx-peers-") as scratch:
        texts = measure.context_of(chosen, checkpoint, options, Path(scratch))
        ids = measure.tokens_of(texts)
        if "kld" in checks:
            measure.measure_drift(chosen, texts, found)
            texts.release()
        if "speed" in checks:
            measure.measure_speed(chosen, ids, conditions, given.new_tokens, given.threads, given.rounds, found)
    head = {
        "artifact": given.artifact.name,
        "checkpoint": given.checkpoint.name,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": given.threads,
        "rounds": given.rounds,
        "new_tokens": given.new_tokens,
    }
    return {**head, "models": records(chosen, found, conditions)}, conditions


def _halves(text: str) -> tuple[str, str, str]:
    return text.partition("=")


def _positions(checkpoint: Path) -> int:
    file = checkpoint / "config.json"
    return int(read_json(file).get("max_position_embeddings", sys.maxsize)) if file.is_file() else sys.maxsize


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    given = parsed(arguments)
    err, out = Console(stderr=True), Console(width=200)
    with listening(lambda line: err.print(f"› {line}", markup=False, highlight=False)):
        told, conditions = measured(given, err)
    show(told["models"], conditions, out)
    alone = [condition for condition in conditions if condition.streams == 1]
    plotted = next((each for each in alone if each.depth == PLOTTED), alone[-1] if alone else None)
    given.output.mkdir(parents=True, exist_ok=True)
    line = json.dumps(told, ensure_ascii=False)
    files = svgs(told["models"], plotted.name if plotted else "") | {"peers.json": line + "\n"}
    for name, text in files.items():
        (given.output / name).write_text(text, encoding="utf-8")
    err.print(f"written to {given.output}: {', '.join(files)}", markup=False)
    print(line)
    return 0


if __name__ == "__main__":
    run(main)
