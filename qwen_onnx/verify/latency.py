"""Paired latency: both engines live in processes of their own and take turns every few tokens.

Turns follow the pattern A B B A, so that whatever else the machine does slows both alike.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwen_onnx.errors import VerificationError
from qwen_onnx.files import folder_bytes
from qwen_onnx.processes.children import LineChild
from qwen_onnx.processes.memory import free_memory
from qwen_onnx.processes.progress import progress
from qwen_onnx.sources.checkpoint import read_json, shards
from qwen_onnx.verify.records import EngineLatency, Latency, Spread, VerifyOptions
from qwen_onnx.verify.roofline import bytes_per_token
from qwen_onnx.verify.statistics import median_ratio

MOST_PLAYS = 3
LAYERWISE = "layerwise"
# of the three processes and of PyTorch's own buffers, beside its weights
BESIDE_BYTES, COPIES = 1_500_000_000, 1.1


@dataclass
class Timings:
    """Seconds measured so far: prefills, decoded segments per token, and tokens per run in sum."""

    prefill: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)


class Worker:
    """A child process with one engine. It obeys one JSON line with one JSON line.

    Raises:
        VerificationError: the child died; its last words are in the message.
    """

    def __init__(self, engine: str, folder: Path, threads: int) -> None:
        self.engine, self.timings = engine, Timings()
        command = [sys.executable, "-m", "qwen_onnx.verify.latency_worker", engine, str(folder), str(threads)]
        self._child = LineChild(command, f"the latency of {engine}", VerificationError)
        try:
            loaded = self._child.receive()
            self.load_s, self.computed = float(loaded["load_s"]), str(loaded["computed"])
        except VerificationError:
            self.close()
            raise

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        return self._child.ask(command)

    def prefill(self, ids: Sequence[int], new_tokens: int) -> None:
        """Read the prompt up to the first new token."""
        self.timings.prefill.append(float(self.ask(do="prefill", ids=list(ids), new_tokens=new_tokens)["seconds"]))

    def decode(self, count: int) -> None:
        """Give the next ``count`` tokens."""
        self.timings.per_token.append(float(self.ask(do="decode", count=count)["seconds"]) / count)

    def close(self) -> None:
        """End the child."""
        self._child.close()

    def record(self, prompt_tokens: int, new_tokens: int) -> EngineLatency:
        """Everything measured, with the child's peak memory."""
        timings = self.timings
        return EngineLatency(
            name="pytorch" if self.engine == LAYERWISE else self.engine,
            computed=self.computed,
            load_s=self.load_s,
            peak_rss=int(self.ask(do="memory")["peak_rss"]),
            ttft_s=spread(timings.prefill),
            tpot_s=spread(timings.per_token),
            prefill_tok_s=spread([prompt_tokens / seconds for seconds in timings.prefill]),
            decode_tok_s=spread([1 / seconds for seconds in timings.per_token]),
        )


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    q1, median, q3 = np.quantile(values, [0.25, 0.5, 0.75])
    return Spread(median=float(median), q1=float(q1), q3=float(q3), count=len(values))


def _pairs(artifact: Worker, baseline: Worker, count: int, step: Callable[[Worker], None]) -> None:
    """``count`` turns for each in the order A B, B A, A B, …"""
    for index in range(count):
        for worker in (artifact, baseline) if index % 2 == 0 else (baseline, artifact):
            step(worker)


def _segments(options: VerifyOptions) -> tuple[int, int]:
    """How many turns of decoding an answer has, and the tokens of each."""
    return max((options.new_tokens - 1) // options.segment, 1), min(options.segment, options.new_tokens - 1)


def _play(artifact: Worker, baseline: Worker, ids: Sequence[int], options: VerifyOptions) -> None:
    segments, size = _segments(options)
    for _ in range(options.rounds):
        _pairs(artifact, baseline, 1, lambda worker: worker.prefill(ids, options.new_tokens))
        _pairs(artifact, baseline, segments, lambda worker: worker.decode(size))
    _pairs(artifact, baseline, options.prefill_pairs, lambda worker: worker.prefill(ids, 1))


def warm_up(worker: Worker, ids: Sequence[int]) -> None:
    """Some tokens that do not count."""
    for _ in range(2):
        worker.prefill(ids, 9)
        worker.decode(8)
    worker.timings = Timings()


def measure(
    artifact: Path,
    checkpoint: Path,
    ids: Sequence[int],
    options: VerifyOptions,
    settled: Callable[[Latency], bool] = lambda _: True,
) -> Latency:
    """Latency of the artifact and of PyTorch fp32 on the prompt ``ids``, and how near memory's limit the artifact is.

    Goes on, up to three times as long, until ``settled`` says that the figures decide.
    """
    workers: list[Worker] = []
    try:
        for engine, folder in (("artifact", artifact), (_baseline_engine(artifact, checkpoint, options), checkpoint)):
            progress(f"latency: loading {engine}")
            workers.append(Worker(engine, folder, options.threads))
            warm_up(workers[-1], ids)
        for _ in range(MOST_PLAYS):
            progress(f"latency: {options.rounds} rounds of {len(ids)} + {options.new_tokens} tokens")
            _play(workers[0], workers[1], ids, options)
            found = _summary(workers[0], workers[1], len(ids), options)
            if settled(found):
                break
        progress("latency: reading memory")
        # last: its arrays would count as memory of the engine
        read = float(workers[0].ask(do="bandwidth")["bytes_per_second"])
        return found.model_copy(update={"bandwidth": read, "bytes_per_token": bytes_per_token(artifact)})
    finally:
        for worker in workers:
            worker.close()


def measure_alone(artifact: Path, ids: Sequence[int], options: VerifyOptions) -> tuple[EngineLatency, float]:
    """Speed of the artifact without anything beside it, and bytes per second that memory gives."""
    progress("speed: loading the artifact")
    worker = Worker("artifact", artifact, options.threads)
    try:
        warm_up(worker, ids)
        segments, size = _segments(options)
        for _ in range(options.rounds):
            worker.prefill(ids, options.new_tokens)
            for _ in range(segments):
                worker.decode(size)
        found = worker.record(len(ids), options.new_tokens)
        return found, float(worker.ask(do="bandwidth")["bytes_per_second"])
    finally:
        worker.close()


def _baseline_engine(artifact: Path, checkpoint: Path, options: VerifyOptions) -> str:
    """PyTorch whole, or layer by layer when memory does not hold it beside the artifact."""
    return "pytorch" if pytorch_fits(checkpoint, options, folder_bytes(artifact)) else LAYERWISE


def pytorch_fits(checkpoint: Path, options: VerifyOptions, beside: int = 0) -> bool:
    """Whether PyTorch runs whole: memory holds it in fp32 and ``beside`` bytes more, or the options say so."""
    if options.pytorch != "fitting":
        return options.pytorch == "whole"
    return COPIES * (pytorch_bytes(checkpoint) + beside) + BESIDE_BYTES < free_memory()


def pytorch_bytes(checkpoint: Path) -> int:
    """Bytes of the weights in fp32."""
    config = read_json(checkpoint / "config.json")
    stored = sum(shard.stat().st_size for shard in shards(checkpoint))
    return stored if "float32" in str(config.get("dtype") or config.get("torch_dtype")) else 2 * stored


def _summary(artifact: Worker, baseline: Worker, prompt_tokens: int, options: VerifyOptions) -> Latency:
    ours, theirs, seed = artifact.timings, baseline.timings, options.seed
    even = len(ours.per_token) // 2 * 2
    return Latency(
        prompt_tokens=prompt_tokens,
        new_tokens=options.new_tokens,
        threads=options.threads,
        artifact=artifact.record(prompt_tokens, options.new_tokens),
        baseline=baseline.record(prompt_tokens, options.new_tokens),
        decode_speedup=median_ratio(theirs.per_token, ours.per_token, seed=seed),
        prefill_speedup=median_ratio(theirs.prefill, ours.prefill, seed=seed),
        control=median_ratio(ours.per_token[:even:2], ours.per_token[1:even:2], seed=seed),
        pairs=tuple((1 / a, 1 / b) for a, b in zip(ours.per_token, theirs.per_token, strict=True)),
    )
