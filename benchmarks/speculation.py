"""Decoding with guessed tokens and without, in turns: ``python -m benchmarks.speculation ARTIFACT``.

Kinds of prompts: ``edit`` gives code and asks for it back with a small change, ``summarise`` gives a text and asks for
a summary, both greedily; ``novel`` has nothing in it that comes twice, and its answers are drawn at a temperature, so
that they do not repeat themselves either. Every prompt is answered by two engines of the same artifact, one that
guesses and one that does not, one after the other, in the order of a round (ABBA); the other engine sleeps meanwhile.
Answers end where the model ends them: one that is made to go on goes in circles, which flatters the guesses.

* ``edit_ratio``, ``summarise_ratio``, ``novel_ratio``: tokens per second after the first, over all prompts of the
  kind, with guesses over without, paired by round; ``..._tok_s`` and ``..._plain_tok_s`` are the speeds themselves.
  Answers of fewer than ``LEAST`` tokens are not measured.
* ``..._accepted``: of the guessed tokens; ``..._tokens_per_step``: of an answer.
* ``..._equal``: share of the tokens up to the first that differs. Wider steps round otherwise, as neighbours in a batch
  do, so that an int4 artifact's answers may part where two tokens are nearly as likely.
"""

from __future__ import annotations

import argparse
import os
import platform
import queue
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.figures import Bound, Figure, conclude
from qwen_onnx.errors import ServiceError, run
from qwen_onnx.runtime.engines.batch import BatchEngine
from qwen_onnx.runtime.engines.interface import TokenEvent, TokenRequest
from qwen_onnx.runtime.engines.sampling import GREEDY, Sampling
from qwen_onnx.runtime.processing.template import ChatTemplate
from qwen_onnx.runtime.processing.tokenizer import TextTokenizer

PATIENCE_S = 600.0
CAPACITY = 2048
# tokens: a shorter answer is over before a clock tells much of it
LEAST = 16
EDITS = (
    (
        "Rename the parameter `items` to `values` and repeat the whole code.",
        """def mean(items):
    if not items:
        raise ValueError("mean of nothing")
    return sum(items) / len(items)


def variance(items):
    middle = mean(items)
    return sum((item - middle) ** 2 for item in items) / len(items)


def median(items):
    ordered = sorted(items)
    half = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[half]
    return (ordered[half - 1] + ordered[half]) / 2
""",
    ),
    (
        "Add a method `clear` at the end of the class and give the whole class back.",
        """class Cache:
    def __init__(self, capacity):
        self.capacity = capacity
        self.entries = {}
        self.hits = 0
        self.misses = 0

    def get(self, key):
        if key in self.entries:
            self.hits += 1
            return self.entries[key]
        self.misses += 1
        return None

    def put(self, key, value):
        if len(self.entries) >= self.capacity:
            oldest = next(iter(self.entries))
            del self.entries[oldest]
        self.entries[key] = value
""",
    ),
    (
        "Change the port to 9090 and write the whole file again.",
        """{
  "name": "weather-station",
  "listen": {"host": "127.0.0.1", "port": 8080},
  "sensors": [
    {"id": "roof", "kind": "temperature", "interval_seconds": 60},
    {"id": "garden", "kind": "humidity", "interval_seconds": 300},
    {"id": "cellar", "kind": "pressure", "interval_seconds": 600}
  ],
  "storage": {"path": "/var/lib/weather", "keep_days": 30},
  "alerts": {"frost_below": 0, "storm_above": 90}
}
""",
    ),
)
TEXTS = (
    """The lighthouse at the northern end of the island was built in 1874 from granite that was quarried on the
mainland and brought over by barge. Its lamp burned rapeseed oil at first, then paraffin, and since 1931 it has
been electric. The keeper and his family lived in the white house beside the tower, where they kept goats and a
small garden behind a stone wall. During the great storm of 1953 the sea broke the landing stage, and for eleven
days no boat could reach the island. The last keeper left in 1988, when the light was automated. Today the house
is a museum, and visitors may climb the 142 steps to the gallery on Sundays between May and September.""",
    """Bread made with a sourdough starter rises because wild yeast and lactic acid bacteria live together in the
dough. The yeast makes carbon dioxide, which stretches the gluten, and the bacteria make acids, which give the
bread its flavour and keep it from going mouldy. A starter is fed with flour and water once a day if it is kept
at room temperature, or once a week if it is kept in the refrigerator. Before baking, the baker mixes a part of
the starter with more flour, water and salt, lets the dough rise for several hours, shapes it, and lets it rise
again overnight in a cool place. The loaf is baked in a hot oven with steam, so that the crust stays soft long
enough for the bread to grow.""",
    """The city council decided on Tuesday to close the old bridge to cars from the first of March. Engineers had found
cracks in two of the five piers and warned that heavy vehicles could make them worse. Pedestrians and cyclists
may still use the bridge, and buses will take the longer way over the ring road. The repair is expected to take
fourteen months and to cost nine million euros, of which the state pays two thirds. Shopkeepers on the eastern
bank fear that they will lose customers and have asked for a free shuttle bus. The council will discuss their
request at its next meeting in two weeks.""",
)
NOVEL = (
    "Write a poem in which no word comes twice.",
    "Invent a short tale about a fox, a clock and a river, and surprise me in every sentence.",
    "List unusual animals with one remark about each.",
)


@dataclass(frozen=True)
class Options:
    """How much is measured; lengths are tokens."""

    new_tokens: int = 128
    rounds: int = 6
    threads: int | None = None


@dataclass(frozen=True)
class Answered:
    """One answer: its tokens, and the seconds between the first and the last."""

    tokens: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Pair:
    """A prompt's answers with guesses and without, and how many tokens were guessed, and how many of them right."""

    guessed: Answered
    plain: Answered
    drafted: int
    accepted: int

    @property
    def long_enough(self) -> bool:
        """Whether both have tokens enough for a clock."""
        return min(len(self.guessed.tokens), len(self.plain.tokens)) >= LEAST


def speed(answers: Sequence[Answered]) -> float:
    """Tokens per second of all answers, each after its first token."""
    return sum(len(one.tokens) - 1 for one in answers) / sum(one.seconds for one in answers)


def prompts(folder: Path) -> dict[str, list[tuple[int, ...]]]:
    """Token ids of each kind, by the artifact's own template."""
    tokenizer, template = TextTokenizer(folder), ChatTemplate(folder)
    asked = {
        "edit": [f"{wish}\n\n```\n{code}```" for wish, code in EDITS],
        "summarise": [f"Summarise this text.\n\n{text}" for text in TEXTS],
        "novel": list(NOVEL),
    }
    try:
        return {
            kind: [tuple(template.encode([{"role": "user", "content": text}], tokenizer, CAPACITY)) for text in texts]
            for kind, texts in asked.items()
        }
    finally:
        template.close()


def answer(engine: BatchEngine, request: TokenRequest) -> Answered:
    """Run one request alone; ServiceError when the engine fails."""
    events: queue.SimpleQueue[tuple[float, TokenEvent]] = queue.SimpleQueue()
    engine.submit(request, lambda event: events.put((time.perf_counter(), event)))
    tokens: list[int] = []
    times: list[float] = []
    while True:
        at, event = events.get(timeout=PATIENCE_S)
        if event.error is not None:
            raise ServiceError(f"the engine failed: {event.error}")
        if event.last:
            return Answered(tuple(tokens), times[-1] - times[0] if times else 0.0)
        tokens.append(event.token or 0)
        times.append(at)


def common(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of the tokens up to the first that differs."""
    for index, pair in enumerate(zip(one, other, strict=False)):
        if pair[0] != pair[1]:
            return index / len(one)
    return min(1.0, len(other) / len(one)) if one else 1.0


class Bench:
    """Two engines of one artifact; ``values`` holds one entry a round for each figure."""

    def __init__(self, folder: Path, options: Options) -> None:
        self._options = options
        self._prompts = prompts(folder)
        self._engines = {
            name: BatchEngine(folder, streams=1, capacity=CAPACITY, threads=options.threads, speculate=name)
            for name in ("ngram", "off")
        }
        self.values: dict[str, list[float]] = defaultdict(list)

    def request(self, kind: str, ids: tuple[int, ...], number: int) -> TokenRequest:
        """The same for both engines. A seed would keep to costs that are assumed: ``novel`` is drawn without."""
        sampling = Sampling(temperature=1.0, top_p=0.95) if kind == "novel" else GREEDY
        # one that the prefix cache does not know, so that both engines read all of it
        return TokenRequest(ids, self._options.new_tokens, sampling, cache_scope=str(number))

    def pair(self, kind: str, ids: tuple[int, ...], number: int) -> Pair:
        """One prompt by both, in the order of the round."""
        told: dict[str, Answered] = {}
        guessing = self._engines["ngram"]
        before = guessing.stats()
        for name in ("ngram", "off") if number % 2 == 0 else ("off", "ngram"):
            told[name] = answer(self._engines[name], self.request(kind, ids, number))
        after = guessing.stats()
        drafted = after.drafted_tokens - before.drafted_tokens
        return Pair(told["ngram"], told["off"], drafted, after.accepted_tokens - before.accepted_tokens)

    def all_rounds(self, say: Callable[[str], None]) -> None:
        """Each prompt once a round, in an order of its own; a first one teaches the engine what steps cost."""
        for kind, known in self._prompts.items():
            self.pair(kind, known[0], -2)
        for number in range(self._options.rounds):
            say(f"round {number + 1} of {self._options.rounds}")
            order = [(kind, ids) for kind, known in self._prompts.items() for ids in known]
            # the same for the two rounds of an ABBA
            random.Random(number // 2).shuffle(order)
            found = defaultdict(list)
            for kind, ids in order:
                found[kind].append(self.pair(kind, ids, number))
            for kind, pairs in found.items():
                self._note(kind, [pair for pair in pairs if pair.long_enough])

    def _note(self, kind: str, pairs: list[Pair]) -> None:
        """The figures of a round, over all prompts of a kind; nothing when every answer was too short."""
        if not pairs:
            return
        guessed, plain = (speed([getattr(pair, name) for pair in pairs]) for name in ("guessed", "plain"))
        drafted, accepted = (sum(getattr(pair, name) for pair in pairs) for name in ("drafted", "accepted"))
        tokens = sum(len(pair.guessed.tokens) for pair in pairs)
        told = {"ratio": guessed / plain, "tok_s": guessed, "plain_tok_s": plain}
        told["accepted"] = accepted / drafted if drafted else float("nan")
        told["tokens_per_step"] = tokens / (tokens - accepted)
        if kind != "novel":
            told["equal"] = sum(common(pair.guessed.tokens, pair.plain.tokens) for pair in pairs) / len(pairs)
        for name, value in told.items():
            self.values[f"{kind}_{name}"].append(value)

    def close(self) -> None:
        """Free both engines."""
        for engine in self._engines.values():
            engine.close()


def benchmark(folder: Path, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure an artifact.

    Returns:
        ``head``: where and how; ``figures``: name to ``Figure`` or None; names as in the module's docstring.

    Raises:
        ArtifactError: it does not load, or has no chat template. ServiceError: an engine failed.
    """
    bench = Bench(folder, options)
    try:
        bench.all_rounds(say)
    finally:
        bench.close()
    head = {
        "artifact": folder.name,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "threads": options.threads,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "prompt_tokens": {kind: [len(ids) for ids in known] for kind, known in bench._prompts.items()},
    }
    return {"head": head, "figures": {name: Figure.of(values) for name, values in sorted(bench.values.items())}}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 when a bound is broken."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculation", description="decode with guessed tokens and without, in turns"
    )
    default = Options()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--new-tokens", type=int, default=default.new_tokens)
    parser.add_argument("--rounds", type=int, default=default.rounds, help="an even number takes each order as often")
    parser.add_argument("--threads", type=int, help="of onnxruntime")
    parser.add_argument("--gate", action="append", default=[], metavar="NAME>=VALUE", help="exit 1 when it is broken")
    given = parser.parse_args(arguments)
    bounds = [Bound.parse(text) for text in given.gate]
    options = Options(given.new_tokens, given.rounds, given.threads)
    told = benchmark(given.artifact.resolve(), options, Console(stderr=True).print)
    return conclude(told, f"{told['head']['artifact']}, {options.new_tokens} new tokens", bounds)


if __name__ == "__main__":
    run(main)
