"""How much memory and disk a verification takes: ``python -m benchmarks.verify_memory FOLDER``.

Makes a random checkpoint and its int4 artifact, then proves the artifact in a child process as ``optimize`` does; the
speed, whose check loads a layer of PyTorch, with ``--latency`` alone. Samples the child's anonymous memory (RssAnon of
proc(5): pages of mapped files do not count, since they can be dropped and read again) and its scratch files. Prints a
table, then one line of JSON. Exits 1 when either went over its bound: of memory the artifact and 2.5 GB, of disk 3 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.build_memory import Sampler, olive_config
from benchmarks.synthetic import Size, write_checkpoint
from qwen_onnx.catalog.schema import Limits
from qwen_onnx.export.olive import run_olive
from qwen_onnx.files import folder_bytes

MEMORY, DISK = 2_500_000_000, 3_000_000_000  # bytes; of memory besides the artifact
CHECKS = ("graph_parity", "drift", "kv_decode", "batched", "greedy", "size")
# one short round beside them: its memory is that of a long one
LATENCY = {"rounds": 1, "new_tokens": 17, "prefill_pairs": 0, "pytorch": "layerwise"}
# random weights have nearly uniform predictions, whatever is done to them: what is judged here is the memory
LIMITS = Limits(kld_mean=10, kld_p99=100, top1=1e-6, ppl_ratio=100)


def build(checkpoint: Path, folder: Path, size: Size) -> Path:
    """The artifact of a random checkpoint, its weights rounded to the nearest code: that takes the least time."""
    config = olive_config(size, {})
    config["passes"] = {"build": config["passes"]["build"] | {"algo_config": "rtn_last" if size.experts else "rtn"}}
    folder.mkdir(parents=True)
    return run_olive(config, checkpoint, folder / "work", folder / "build.log")


def measure(
    checkpoint: Path, artifact: Path, scratch: Path, options: dict[str, Any], *, keeps: bool = True
) -> dict[str, Any]:
    """Verify in a child process; ``keeps``: with PyTorch's answers for other devices.

    Returns:
        ``artifact_bytes``; ``anonymous_bytes``, ``resident_bytes``, ``disk_bytes``: peaks; ``stages``: anonymous bytes
        by check; ``verdicts`` by check; ``seconds``.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    told = json.dumps([str(checkpoint), str(artifact), str(scratch), keeps, {"checks": CHECKS, **options}])
    begin = time.monotonic()
    with Sampler(scratch) as sampler:
        command = [sys.executable, "-m", "benchmarks.verify_memory", "--child", told]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            verdicts: dict[str, str] = {}
            for line in child.stdout:
                said = json.loads(line)
                if isinstance(said, dict):
                    verdicts = said
                else:
                    print(f"› {said}", file=sys.stderr, flush=True)
                    sampler.stage = said.removeprefix("check: ") if said.startswith("check: ") else sampler.stage
    if child.returncode:
        raise SystemExit(f"the verification ended with {child.returncode}")
    return {
        "artifact_bytes": folder_bytes(artifact),
        "anonymous_bytes": sampler.peaks.anonymous,
        "resident_bytes": sampler.peaks.resident,
        "disk_bytes": sampler.peaks.disk,
        "stages": sampler.peaks.stages,
        "verdicts": verdicts,
        "seconds": round(time.monotonic() - begin, 1),
    }


def verify_here(told: str) -> int:
    """In the child: every line is a JSON text of progress, the last one the verdicts."""
    from qwen_onnx.processes.progress import listening
    from qwen_onnx.verify import Keep, VerifyOptions, verify_artifact

    checkpoint, artifact, scratch, keeps, options = json.loads(told)
    with listening(lambda line: print(json.dumps(line), flush=True)):
        report = verify_artifact(
            Path(artifact),
            Path(checkpoint),
            None,
            LIMITS,
            options=VerifyOptions.model_validate(options),
            cache=Path(scratch),
            keep=Keep(Path(scratch), model="random", weights="0" * 64) if keeps else None,
        )
    print(json.dumps({item.name: f"{item.verdict} {item.detail}".strip() for item in report.checks}), flush=True)
    return 0


def main() -> int:
    """Read the command line, measure, print."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify_memory", description=__doc__)
    parser.add_argument("folder", type=Path, help="scratch folder; what is in it already is used again")
    parser.add_argument("--window", type=int, default=512, help="tokens of a text")
    parser.add_argument("--layers-at-once", type=int, help="of the artifact, which is then run in slices")
    parser.add_argument("--windows", type=int, default=1, help="texts of each domain")
    parser.add_argument("--decode-tokens", type=int, default=96, help="tokens of a text that go through the KV cache")
    parser.add_argument("--greedy-tokens", type=int, default=32, help="of an answer")
    parser.add_argument(
        "--no-answers", action="store_true", help="keep none of PyTorch's, which take up to four passes"
    )
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of the prompt whose speed is measured")
    parser.add_argument("--latency", action="store_true", help="the speed, too")
    for item in fields(Size):
        parser.add_argument(f"--{item.name.replace('_', '-')}", type=int, default=item.default)
    given = vars(parser.parse_args())
    folder, layers = given.pop("folder").resolve(), given.pop("layers_at_once")
    options: dict[str, Any] = {
        "window": given.pop("window"),
        "windows_per_domain": given.pop("windows"),
        "layers_at_once": layers,
    }
    options |= {name: given.pop(name) for name in ("decode_tokens", "greedy_tokens", "prompt_tokens")}
    keeps = not given.pop("no_answers")
    if given.pop("latency"):
        options |= LATENCY | {"checks": (*CHECKS, "latency")}
    size = replace(Size(), **given)
    checkpoint, made = folder / "checkpoint", folder / "artifact"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, size)
    artifact = made / "model.txt"
    if not artifact.exists():
        artifact.write_text(str(build(checkpoint, made, size)), encoding="utf-8")
    model = Path(artifact.read_text(encoding="utf-8"))
    found = measure(checkpoint, model, folder / "scratch", options, keeps=keeps)
    found |= {"memory_bound_bytes": MEMORY + found["artifact_bytes"], "disk_bound_bytes": DISK}
    table = Table("figure", "GB")
    for name, value in found.items():
        if name.endswith("_bytes"):
            table.add_row(name.removesuffix("_bytes"), f"{value / 1e9:.3f}")
    for stage, value in found["stages"].items():
        table.add_row(f"anonymous, {stage}", f"{value / 1e9:.3f}")
    table.add_row("seconds", str(found["seconds"]))
    Console().print(table)
    within = found["anonymous_bytes"] <= found["memory_bound_bytes"] and found["disk_bytes"] <= DISK
    print(json.dumps({"size": asdict(size), **found, "checkpoint_bytes": folder_bytes(checkpoint), "within": within}))
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(verify_here(sys.argv[2]) if sys.argv[1:2] == ["--child"] else main())
