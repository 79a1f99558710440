"""NF4 and FP4 by ONNX Runtime, beside an int4 artifact: ``python -m benchmarks.bnb4 INT4 FP32 CHECKPOINT``.

Quantises the matrices of an fp32 artifact (``qwen-onnx optimize starter --precision fp32``) by MatMulBnb4, as
bitsandbytes does, and measures size, drift and speed of both beside the int4 artifact, which takes turns with them.
Prints a table, then one line of JSON. MatMulBnb4 takes no embedding, so that a head shared with it is stored twice.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure
from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.catalog.schema import Limits
from qwen_onnx.errors import VerificationError
from qwen_onnx.verify import VerifyOptions, verify_artifact
from qwen_onnx.verify.latency import Worker, warm_up
from qwen_onnx.verify.statistics import median_ratio

BLOCK = 64  # what bitsandbytes has
PROMPT, DECODED = 256, 16
# drift is measured, not judged
LIMITS = Limits(kld_mean=10, kld_p99=100, top1=1e-6, ppl_ratio=100)


def quantised(source: Path, target: Path, kind: str) -> Path:
    """A copy of the fp32 artifact ``source`` whose matrices are of ``kind``, NF4 or FP4."""
    import onnx
    from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer

    graph = GenaiConfig.read(source, VerificationError).graph_file
    target.mkdir()
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith(graph):
            shutil.copyfile(path, target / path.name)
    quantizer = MatMulBnb4Quantizer(onnx.load(source / graph), getattr(MatMulBnb4Quantizer, kind), BLOCK)
    quantizer.process()
    left = [node.name for node in quantizer.model.model.graph.node if node.op_type == "MatMul"]
    if left:
        raise SystemExit(f"{source}: matrices that are not quantised: {', '.join(left[:3])}")
    quantizer.model.save_model_to_file(str(target / graph), use_external_data_format=True)
    return target


def files_bytes(folder: Path) -> int:
    """Bytes of the graph and its weights."""
    graph = GenaiConfig.read(folder, VerificationError).graph_file
    return sum(path.stat().st_size for path in folder.iterdir() if path.name.startswith(graph))


def drift_of(folder: Path, checkpoint: Path) -> dict[str, float]:
    """Mean KL divergence from PyTorch in nats per token, its bounds, and the share of equal first choices."""
    drift = verify_artifact(folder, checkpoint, None, LIMITS, options=VerifyOptions(checks=("drift",))).drift
    if drift is None:
        raise SystemExit(f"{folder}: the drift could not be measured")
    mean = drift.kld_mean
    return {"kld": mean.value, "kld_lower": mean.lower, "kld_upper": mean.upper, "top1": drift.top1.value}


def speeds(folders: dict[str, Path], threads: int, rounds: int) -> dict[str, Worker]:
    """Every model in a process of its own, in turns; the order turns round with every round."""
    ids = list(range(16, 16 + PROMPT))
    workers: dict[str, Worker] = {}
    try:
        for name, folder in folders.items():
            workers[name] = Worker("artifact", folder, threads)
            warm_up(workers[name], ids[:32])
        for number in range(rounds):
            for worker in list(workers.values())[:: 1 if number % 2 == 0 else -1]:
                worker.prefill(ids, DECODED + 1)
                worker.decode(DECODED)
    finally:
        for worker in workers.values():
            worker.close()
    return workers


def rows(folders: dict[str, Path], checkpoint: Path, threads: int, rounds: int) -> dict[str, dict[str, Any]]:
    """What was measured of each model, by its name; the first one is what the speeds are divided by."""
    found: dict[str, dict[str, Any]] = {
        name: {"bytes": files_bytes(folder), **drift_of(folder, checkpoint)} for name, folder in folders.items()
    }
    timed = speeds(folders, threads, rounds)
    base = next(iter(timed.values())).timings
    for name, worker in timed.items():
        ours = worker.timings
        for kind, seconds, of, tokens in (
            ("decode", ours.per_token, base.per_token, 1),
            ("prefill", ours.prefill, base.prefill, PROMPT),
        ):
            ratio = median_ratio(of, seconds, seed=0)
            figure = Figure.of([tokens / each for each in seconds])
            assert figure is not None, "every round gives one"
            found[name] |= {
                f"{kind}_tok_s": figure.median,
                f"{kind}_of_int4": [ratio.value, ratio.lower, ratio.upper],
            }
    return found


def main() -> None:
    """Read the command line, measure, print."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m benchmarks.bnb4", description=__doc__)
    parser.add_argument("int4", type=Path)
    parser.add_argument("fp32", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"int4": given.int4} | {
            kind.lower(): quantised(given.fp32, Path(scratch) / kind, kind) for kind in ("NF4", "FP4")
        }
        found = rows(folders, given.checkpoint, given.threads, given.rounds)
    table = Table("", "MB", "mean KLD", "top-1", "decode tok/s", "of int4", "prefill tok/s", "of int4")
    for name, row in found.items():
        ratios = [
            f"× {value:.2f} [{lower:.2f}, {upper:.2f}]"
            for value, lower, upper in (row["decode_of_int4"], row["prefill_of_int4"])
        ]
        table.add_row(
            name,
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['kld']:.4f} [{row['kld_lower']:.4f}, {row['kld_upper']:.4f}]",
            f"{row['top1']:.1%}",
            f"{row['decode_tok_s']:.1f}",
            ratios[0],
            f"{row['prefill_tok_s']:.0f}",
            ratios[1],
        )
    Console().print(table)
    print(json.dumps({"block": BLOCK, "prompt": PROMPT, "threads": given.threads, "models": found}))


if __name__ == "__main__":
    main()
