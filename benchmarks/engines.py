"""Continuous batching beside onnxruntime-genai, on the same artifact: ``python -m benchmarks.engines ARTIFACT``.

Both are loaded in one process and take turns, ABBA by round; prompts are random tokens, and no two begin alike but
where it says so. Answers are greedy and go on to their full length.

* ``decode_1_ratio``, ``decode_4_ratio``: tokens per second of one and of four answers at once, behind prompts of 64
  tokens, from the last first token on; genai answers four one after the other. ``..._tok_s``, ``..._genai_tok_s``.
* ``turn_ratio``: time to the first token of a second turn, whose prompt is the first one of 512 tokens, its answer
  and 32 more; genai's over ours. ``turn_ms``, ``turn_genai_ms``; ``turn_cached`` tokens of ours needed no computing.
* ``system_ratio`` and so on: the same of a third prompt that shares its first 512 tokens with two before it.
"""

from __future__ import annotations

import argparse
import os
import platform
import queue
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import numpy as np

from benchmarks.figures import Bound, Figure, conclude
from benchmarks.peers.measure import Speeds
from qwen_onnx.errors import run
from qwen_onnx.processes.progress import progress
from qwen_onnx.runtime.engines.batch import BatchEngine
from qwen_onnx.runtime.engines.genai import Shape
from qwen_onnx.runtime.engines.interface import TokenEngine, TokenEvent, TokenRequest
from qwen_onnx.runtime.engines.serial import SerialEngine

OURS, GENAI = "", "genai_"
STREAMS, SHORT, LONG, MORE = 4, 64, 512, 32
# of a vocabulary, so that none is special
TOKENS = 3, 200


@dataclass(frozen=True)
class Answer:
    """When each token of an answer came, and how much of its prompt needed no computing."""

    tokens: tuple[int, ...]
    times: tuple[float, ...]
    cached: int


class Bench:
    """Both engines, and what was measured of them by the names of the module's docstring."""

    def __init__(self, folder: Path, threads: int | None, count: int) -> None:
        room = LONG + 2 * (count + MORE)
        self._count, self._random = count, np.random.default_rng(0)
        self._engines: dict[str, TokenEngine] = {
            OURS: BatchEngine(folder, streams=STREAMS, capacity=room, threads=threads, speculate="off"),
            GENAI: SerialEngine(folder, threads=threads),
        }
        self.values: dict[str, list[float]] = defaultdict(list)

    def round(self, order: Sequence[str], *, counts: bool = True) -> None:
        """Everything once, one engine after the other."""
        for streams in (1, STREAMS):
            prompts = [self._drawn(SHORT) for _ in range(streams)]
            self._compare(f"decode_{streams}", {name: self._speed(name, prompts) for name in order}, counts)
        first, system, ends = self._drawn(LONG), self._drawn(LONG), [self._drawn(MORE) for _ in range(3)]
        turns = {name: self._turn(name, first, ends[0]) for name in order}
        systems = {name: [self._alone(name, system + end) for end in ends][-1] for name in order}
        for kind, found in (("turn", turns), ("system", systems)):
            self._compare(kind, {name: answer.times[0] for name, answer in found.items()}, counts)
            if counts:
                self.values[f"{kind}_cached"].append(found[OURS].cached)

    def _compare(self, kind: str, found: dict[str, float], counts: bool) -> None:
        """Speeds in tokens per second, or seconds until a first token."""
        if not counts:
            return
        speed = kind.startswith("decode")
        ratio = found[OURS] / found[GENAI]
        self.values[f"{kind}_ratio"].append(ratio if speed else 1 / ratio)
        for name, value in found.items():
            self.values[f"{kind}_{name}{'tok_s' if speed else 'ms'}"].append(value if speed else 1000 * value)

    def _drawn(self, count: int) -> tuple[int, ...]:
        return tuple(int(token) for token in self._random.integers(*TOKENS, count))

    def _speed(self, name: str, prompts: Sequence[tuple[int, ...]]) -> float:
        """Of answers at once, while all of them are under way; of genai's, whose turn it is."""
        times = [one.times for one in self._answers(name, prompts)]
        if name == GENAI:
            # all of a length
            return harmonic_mean(Speeds.of([each], SHORT).decode for each in times)
        return Speeds.of(times, SHORT * len(times)).decode

    def _alone(self, name: str, prompt: tuple[int, ...]) -> Answer:
        return self._answers(name, [prompt])[0]

    def _turn(self, name: str, first: tuple[int, ...], more: tuple[int, ...]) -> Answer:
        """The answer to ``more`` behind a first prompt and its answer."""
        return self._alone(name, first + self._alone(name, first).tokens + more)

    def _answers(self, name: str, prompts: Sequence[tuple[int, ...]]) -> list[Answer]:
        """Seconds from when they were asked."""
        begin = time.perf_counter()
        told: queue.SimpleQueue[tuple[int, float, TokenEvent]] = queue.SimpleQueue()
        for index, prompt in enumerate(prompts):
            request = TokenRequest(prompt, self._count, stop_on_eos=False)
            self._engines[name].submit(request, _listener(told, index))
        heard: dict[int, list[tuple[float, TokenEvent]]] = defaultdict(list)
        ended = 0
        while ended < len(prompts):
            index, at, event = told.get()
            if event.error is not None:
                raise event.error
            heard[index].append((at - begin, event))
            ended += event.last
        answers = []
        for events in (heard[index] for index in range(len(prompts))):
            tokens = [(at, event.token) for at, event in events if event.token is not None]
            times, ids = zip(*tokens, strict=True)
            answers.append(Answer(ids, times, events[-1][1].cached_tokens))
        return answers


def _listener(told: queue.SimpleQueue[tuple[int, float, TokenEvent]], index: int) -> Callable[[TokenEvent], None]:
    return lambda event: told.put((index, time.perf_counter(), event))


def benchmark(folder: Path, threads: int | None, count: int, rounds: int) -> dict[str, Any]:
    """Measure an artifact.

    Returns:
        ``head``: where and how; ``figures``: name to ``Figure``.

    Raises:
        ArtifactError: an engine does not load it.
    """
    bench = Bench(folder, threads, count)
    for number in range(rounds + 1):
        progress(f"round {number} of {rounds}" if number else "warming up")
        bench.round([OURS, GENAI] if number % 2 else [GENAI, OURS], counts=number > 0)
    head = {
        "artifact": folder.name,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "threads": threads,
        "rounds": rounds,
        "new_tokens": count,
        "vocabulary": Shape.read(folder).vocab_size,
    }
    return {"head": head, "figures": {name: Figure.of(values) for name, values in bench.values.items()}}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6, help="an even number takes each order as often")
    parser.add_argument("--threads", type=int, help="of onnxruntime")
    parser.add_argument("--gate", action="append", default=[], metavar="NAME>=VALUE", help="exit 1 when it is broken")
    given = parser.parse_args(arguments)
    told = benchmark(given.artifact, given.threads, given.new_tokens, given.rounds)
    return conclude(told, "Continuous batching beside onnxruntime-genai", [Bound.parse(text) for text in given.gate])


if __name__ == "__main__":
    raise SystemExit(run(main))
