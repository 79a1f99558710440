"""What is measured of each model: its drift from PyTorch, and its speed in turns with the others."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from benchmarks.bnb4 import LIMITS
from benchmarks.peers.models import Model
from benchmarks.peers.worker import Logits, Settings
from qwen_onnx.catalog.schema import Verification
from qwen_onnx.errors import VerificationError
from qwen_onnx.processes.children import LineChild
from qwen_onnx.processes.progress import progress
from qwen_onnx.verify.context import Context
from qwen_onnx.verify.drift import DriftStudy
from qwen_onnx.verify.records import VerifyOptions
from qwen_onnx.verify.statistics import DriftEstimates

CONTROL = "control"
STREAM_PROMPT = 64  # tokens of each prompt where several are answered at once
WARM_UP = 4  # tokens


class Worker:
    """A process with one model; see ``worker`` for what it is asked.

    Raises:
        VerificationError: it does not load, or fails or dies later; its last words are in the message.
    """

    def __init__(self, model: Model, *, threads: int, streams: int, capacity: int) -> None:
        settings = Settings(str(model.path), threads, streams, capacity)
        python = model.interpreter
        command = [str(python.python), "-m", "benchmarks.peers.worker", model.backend, settings.as_json()]
        # one count for every engine: what this process was told to leave to others is not the peer's
        variables = {**python.variables, "OMP_NUM_THREADS": str(threads)}
        self.model = model
        self._child = LineChild(
            command, model.name, lambda what: VerificationError(what, where=str(model.path)), variables
        )
        try:
            self.load_s = float(self._child.receive()["load_s"])
        except VerificationError:
            self.close()
            raise

    def logits(self, ids: Sequence[int]) -> Logits:
        """Logits [tokens, vocabulary] of a text."""
        shape = self._child.ask({"do": "logits", "ids": list(ids)})["shape"]
        data = self._child.read(int(np.prod(shape, dtype=np.int64)) * 4)
        return np.frombuffer(data, dtype=np.float32).reshape(shape)

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Speeds:
        """Answer ``prompts`` at once with ``new_tokens`` each."""
        asked = {"do": "run", "prompts": [list(ids) for ids in prompts], "new_tokens": new_tokens}
        arrivals: list[list[float]] = self._child.ask(asked)["arrivals"]
        if [len(times) for times in arrivals] != [new_tokens] * len(prompts):
            counts = ", ".join(str(len(times)) for times in arrivals)
            raise VerificationError(f"{self.model.name} gave {counts} tokens instead of {new_tokens} for each prompt")
        return Speeds.of(arrivals, sum(map(len, prompts)))

    def peak_rss(self) -> int:
        """Most bytes that were resident in the process."""
        return int(self._child.ask({"do": "memory"})["peak_rss"])

    def close(self) -> None:
        """End the process."""
        self._child.close()


@dataclass(frozen=True)
class Speeds:
    """Tokens per second: of the prompts until the last of the first tokens; and of all streams while all decode."""

    prefill: float
    decode: float

    @classmethod
    def of(cls, arrivals: Sequence[Sequence[float]], prompt_tokens: int) -> Speeds:
        """From the seconds at which the tokens of each stream came; NaN where the streams did not overlap."""
        begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
        inside = [[at for at in times if begin <= at <= end] for times in arrivals]
        # each stream by its own gaps: those of one step are told one after the other
        rates = [(len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else math.nan for times in inside]
        return cls(prompt_tokens / begin, sum(rates))


@dataclass(frozen=True)
class Condition:
    """Prompts of ``depth`` tokens, ``streams`` of them at once."""

    depth: int
    streams: int

    @property
    def name(self) -> str:
        """As in the JSON: ``512x1``."""
        return f"{self.depth}x{self.streams}"

    def prompts(self, ids: Sequence[int], number: int) -> list[list[int]]:
        """Those of a round, cut out of ``ids`` at places of their own, so that none begins as another does."""
        room = len(ids) - self.depth
        starts = [(number * 1009 + stream * 131) % (room + 1) for stream in range(self.streams)]
        return [list(ids[start : start + self.depth]) for start in starts]


@dataclass
class Measured:
    """One model's figures: drift, or None; and by condition one ``Speeds`` a round.

    ``load_s``: seconds of each process that was started. ``peak_rss``: bytes by depth, of a process of one stream.
    """

    drift: DriftEstimates | None = None
    load_s: list[float] = field(default_factory=list)
    peak_rss: dict[int, int] = field(default_factory=dict)
    speeds: dict[str, list[Speeds]] = field(default_factory=lambda: defaultdict(list))


def context_of(models: Sequence[Model], checkpoint: Path, options: VerifyOptions, scratch: Path) -> Context:
    """The texts of a verification, and the checkpoint in PyTorch."""
    return Context(models[0].path, checkpoint, None, LIMITS, Verification.RUN, options, None, None, scratch)


def measure_drift(models: Sequence[Model], context: Context, found: Mapping[str, Measured]) -> None:
    """Each model beside PyTorch on the verification's own texts, one after the other.

    Raises:
        VerificationError: a model gives a logit that is no number, or see ``Worker``.
    """
    for model in models:
        progress(f"drift of {model.name}")
        worker = Worker(model, threads=context.options.threads, streams=0, capacity=context.options.window)
        try:
            found[model.name].drift = _drift(worker, context)
        finally:
            worker.close()
        found[model.name].load_s.append(worker.load_s)


def _drift(worker: Worker, context: Context) -> DriftEstimates:
    study = DriftStudy(context.teacher, lambda: worker, None, context.pools, context.options)
    study.start()
    if not study.finite:
        raise VerificationError(f"{worker.model.name} gives logits that are no numbers", where=str(worker.model.path))
    return study.estimates()


@contextmanager
def working(models: Sequence[Model], *, threads: int, streams: int, capacity: int) -> Iterator[list[Worker]]:
    """A process of each model, which ends with the block."""
    workers: list[Worker] = []
    try:
        for model in models:
            progress(f"loading {model.name} for {streams} streams" if streams > 1 else f"loading {model.name}")
            workers.append(Worker(model, threads=threads, streams=streams, capacity=capacity))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def in_turns(workers: Sequence[Worker], rounds: int) -> Iterator[tuple[int, Worker]]:
    """A B C, C B A, A B C, …, so that whatever else the machine does slows all alike."""
    for number in range(rounds):
        for worker in workers if number % 2 == 0 else reversed(workers):
            yield number, worker


def measure_speed(
    models: Sequence[Model],
    ids: Sequence[int],
    conditions: Sequence[Condition],
    new_tokens: int,
    threads: int,
    rounds: int,
    found: Mapping[str, Measured],
) -> None:
    """Every condition of one stream, then those of several, each model in a process of its own.

    Args:
        models: one process each; the first has a second one, ``CONTROL``, which differs from it by noise alone.
        ids: tokens that prompts are cut from.
        found: by name of the model, ``CONTROL`` included.
    """
    first = replace(models[0], name=CONTROL)
    for several in (False, True):
        asked = [condition for condition in conditions if (condition.streams > 1) is several]
        if not asked:
            continue
        streams = max(condition.streams for condition in asked)
        capacity = max(condition.depth for condition in asked) + new_tokens
        chosen = models if several else [*models, first]
        with working(chosen, threads=threads, streams=streams, capacity=capacity) as workers:
            for worker in workers:
                found[worker.model.name].load_s.append(worker.load_s)
            for condition in sorted(asked, key=lambda each: (each.depth, each.streams)):
                progress(f"speed: {condition.streams} × {condition.depth} tokens, {rounds} rounds")
                for worker in workers:
                    # engines compile for a new shape: the first run of each does not count
                    worker.run(condition.prompts(ids, rounds), WARM_UP)
                for number, worker in in_turns(workers, rounds):
                    found[worker.model.name].speeds[condition.name].append(
                        worker.run(condition.prompts(ids, number), new_tokens)
                    )
                if not several:
                    for worker in workers:
                        found[worker.model.name].peak_rss[condition.depth] = worker.peak_rss()


def conditions_of(depths: Sequence[int], streams: Sequence[int]) -> list[Condition]:
    """One stream at each depth; several at ``STREAM_PROMPT`` tokens, where one is measured too."""
    alone = {*depths, *([STREAM_PROMPT] if 1 in streams else [])}
    several = sorted({count for count in streams if count > 1})
    return [Condition(depth, 1) for depth in sorted(alone)] + [Condition(STREAM_PROMPT, count) for count in several]


def tokens_of(context: Context) -> list[int]:
    """The texts of all domains in turn, so that a prompt of any length holds several kinds."""
    windows = itertools.chain.from_iterable(itertools.zip_longest(*context.pools.values()))
    return [token for window in windows if window for token in window.ids]
