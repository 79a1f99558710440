"""What a server process does under load, measured over HTTP with streamed answers.

``python -m benchmarks.serving ARTIFACT [--streams 2 4] [--prompt-tokens 64 256] [--rounds 5]``

Every round takes each condition once, in an order that rotates, so that whatever else the machine does meets all.
Ratios are paired within a round. Times are a client's: they include HTTP and the server's event loop.

* ``decode_tok_s_N``: tokens of all N streams that came after the last of the first tokens and until the first stream
  ended, divided by that time: no prefill is in it, and no stream runs alone. Answers are kept from ending early; not
  measured: one ended all the same, or streams did not overlap.
* ``decode_ratio_N``: that over the one of a single stream, in the same round.
* ``lone_ttft_ms``: time to the first token of a short request alone; ``late_ttft_ms``: the same while 3 streams run;
  ``step_ms``: median gap between tokens of those streams before it came. ``late_excess_ms`` is
  ``late - 1.5 * lone - step``: at most 0 means that a late request waits for no more than the step under way.
* ``lag_*``: how late the server's event loop is under the most streams, told from inside (``runtime/lag.py``).
* ``prefix_*_ttft_ms``: first and second request with the same long system prompt.
* ``freed_ms``: from the client's hanging up until the engine runs nothing any more.
* ``batch_ratio``: tokens per second of ``QwenService.generate_batch`` over those of one ``generate`` after another.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import platform
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from benchmarks.figures import Bound, Figure, conclude
from benchmarks.live import Answer, LiveServer, OnPiece, http_client, stream_chat
from qwen_onnx.errors import ServiceError, run
from qwen_onnx.runtime.engines.genai import Shape
from qwen_onnx.runtime.processing.tokenizer import TextTokenizer
from qwen_onnx.runtime.service.generation import GenerationConfig
from qwen_onnx.runtime.service.qwen import QwenService

if TYPE_CHECKING:
    import httpx

PATIENCE_S = 600.0
LATE_PROMPT, LATE_TOKENS, OTHERS = 16, 8, 3
# pieces that a running stream has shown before it is taken to be decoding steadily
STEADY = 8
BATCH = 4
ASK = "Count upwards from one, in words, separated by commas, and do not stop before ten thousand."


@dataclass(frozen=True)
class Options:
    """What is measured; lengths are tokens."""

    streams: tuple[int, ...] = (2, 4)
    prompt_tokens: tuple[int, ...] = (64,)
    new_tokens: int = 128
    system_tokens: int = 512
    rounds: int = 5


@dataclass(frozen=True)
class Window:
    """The time in which all streams decode: pieces per second times tokens per piece, and the gaps in ms."""

    tok_s: float
    gaps_ms: tuple[float, ...]

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Window | None:
        """None when the streams did not overlap."""
        if not all(answer.arrivals for answer in answers):
            return None
        start, end = max(a.arrivals[0] for a in answers), min(a.arrivals[-1] for a in answers)
        if end <= start:
            return None
        inside = [[at for at in answer.arrivals if start <= at <= end] for answer in answers]
        # the piece that opens the window was computed before it
        tokens = sum(
            sum(at > start for at in times) * answer.tokens_per_piece
            for times, answer in zip(inside, answers, strict=True)
        )
        gaps = tuple(gap * 1000 for times in inside for gap in np.diff(times).tolist())
        return cls(tokens / (end - start), gaps)


class Prompts:
    """Texts of a given length in tokens, no two with a common beginning: the prefix cache would know it."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._number = itertools.count(int(time.time()) % 100_000)
        self.overhead = 0

    def text(self, tokens: int, *, overhead: bool = True) -> str:
        """At least ``tokens`` long with what the chat template adds, and longer by less than a sentence."""
        number = next(self._number)
        wanted = tokens - (self.overhead if overhead else 0)
        text = f"{number} {ASK}" if wanted > 32 else f"{number} Hello."
        while len(self._tokenizer.encode(text)) < wanted:
            text += f" {ASK}" if wanted - len(self._tokenizer.encode(text)) > 24 else " so"
        return text


class Bench:
    """The measurements of one server; ``values`` holds one entry a round for each figure."""

    def __init__(
        self, server: LiveServer, client: httpx.AsyncClient, prompts: Prompts, options: Options, stops: Collection[int]
    ) -> None:
        self.server, self.client, self.prompts, self.options = server, client, prompts, options
        self._stops, self._goes_on = stops, dict[str, float]()
        self.values: dict[str, list[float]] = defaultdict(list)
        self.prompt_tokens: dict[int, int] = {}

    async def ask(
        self, text: str, tokens: int, *, system: str | None = None, on_piece: OnPiece | None = None
    ) -> Answer:
        """One streamed greedy answer; ServiceError when the server refuses or breaks off."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        body = {"model": self.server.model, "messages": messages, "max_tokens": tokens, "temperature": 0}
        if self._goes_on:
            body["logit_bias"] = self._goes_on
        answer = await stream_chat(self.client, body, on_piece)
        if answer.fault:
            raise ServiceError(f"the server answers {answer.status}: {answer.fault}", where=self.server.url)
        return answer

    async def probe(self) -> dict[str, Any]:
        """What the server tells of itself."""
        told: dict[str, Any] = (await self.client.get("/probe")).json()
        return told

    async def warm_up(self) -> None:
        """Let every path run once, and learn what the chat template adds to a text."""
        if (await self.probe())["engine"].get("kind") == "batch":
            # answers that end by themselves are too short to be timed; genai cannot forbid it
            self._goes_on = {str(token): -100.0 for token in self._stops}
        short = self.prompts.text(1)
        answer = await self.ask(short, 4)
        own = len(self.prompts._tokenizer.encode(short))
        self.prompts.overhead = max(int(answer.usage.get("prompt_tokens", own)) - own, 0)
        await asyncio.gather(*(self.ask(self.prompts.text(32), 16) for _ in range(max(self.options.streams))))
        await self.probe()

    async def decode(self, length: int, streams: int) -> None:
        """``streams`` answers at once; under the most of them, the lag of the event loop too."""
        await self.probe()
        tasks = [self.ask(self.prompts.text(length), self.options.new_tokens) for _ in range(streams)]
        answers = await asyncio.gather(*tasks)
        late = (await self.probe())["late_ms"]
        whole = all(answer.usage.get("completion_tokens") == self.options.new_tokens for answer in answers)
        window = Window.of(answers) if whole else None
        self.values[f"{length}/decode_tok_s_{streams}"].append(window.tok_s if window else float("nan"))
        self.prompt_tokens[length] = int(answers[0].usage.get("prompt_tokens", 0))
        if streams == max(self.options.streams):
            names = {"lag_p50_ms": 0.5, "lag_p99_ms": 0.99, "lag_max_ms": 1.0}
            for name, quantile in names.items():
                self.values[f"{length}/{name}"].append(float(np.quantile(late, quantile)))

    async def late(self, length: int) -> None:
        """A short request alone, then one while ``OTHERS`` streams run."""
        lone = await self.ask(self.prompts.text(LATE_PROMPT), LATE_TOKENS)
        enough, steady = asyncio.Event(), asyncio.Event()
        counts = [0] * OTHERS

        def piece(index: int) -> OnPiece:
            def told(count: int) -> bool:
                counts[index] = count
                if min(counts) >= STEADY:
                    steady.set()
                return not enough.is_set()

            return told

        most = self.options.new_tokens * 8
        tasks = [
            asyncio.create_task(self.ask(self.prompts.text(length), most, on_piece=piece(index)))
            for index in range(OTHERS)
        ]
        # streams that come one after the other never run together: the first ends, and nothing is late
        together = asyncio.ensure_future(steady.wait())
        await asyncio.wait([together, *tasks], return_when=asyncio.FIRST_COMPLETED)
        together.cancel()
        running = not any(task.done() for task in tasks)
        late = await self.ask(self.prompts.text(LATE_PROMPT), LATE_TOKENS)
        running = running and not any(task.done() for task in tasks)
        enough.set()
        gaps = [
            gap
            for answer in await asyncio.gather(*tasks)
            for gap in np.diff([t for t in answer.arrivals if t < late.begin])
        ]
        step = float(np.median(gaps)) if running else float("nan")
        told = {"lone_ttft_ms": lone.ttft, "late_ttft_ms": late.ttft if running else float("nan"), "step_ms": step}
        told["late_excess_ms"] = told["late_ttft_ms"] - 1.5 * lone.ttft - step
        for name, seconds in told.items():
            self.values[f"{length}/{name}"].append(seconds * 1000)

    async def prefix(self) -> None:
        """Two users, one system prompt that the server has not seen before."""
        system = self.prompts.text(self.options.system_tokens, overhead=False)
        times = []
        for name in ("first", "second"):
            answer = await self.ask(self.prompts.text(LATE_PROMPT), LATE_TOKENS, system=system)
            times.append(answer.ttft)
            self.values[f"prefix_{name}_ttft_ms"].append(answer.ttft * 1000)
        self.values["prefix_ratio"].append(times[1] / times[0])
        details = answer.usage.get("prompt_tokens_details") or {}
        self.values["prefix_cached_tokens"].append(float(details.get("cached_tokens", float("nan"))))

    async def freed(self) -> None:
        """Hang up on a long answer and watch the engine."""
        text, most = self.prompts.text(self.options.prompt_tokens[0]), self.options.new_tokens * 8
        await self.ask(text, most, on_piece=lambda count: count < STEADY)
        begin = time.perf_counter()
        while (running := (await self.probe())["engine"].get("running")) and time.perf_counter() - begin < PATIENCE_S:
            await asyncio.sleep(0.001)
        told = running is not None
        self.values["freed_ms"].append((time.perf_counter() - begin) * 1000 if told else float("nan"))

    async def all_rounds(self, say: Callable[[str], None]) -> None:
        """Every condition in every round, in rotating order."""
        await self.warm_up()
        conditions: list[Callable[[], Awaitable[None]]] = [self.prefix, self.freed]
        for length in self.options.prompt_tokens:
            conditions.append(lambda length=length: self.late(length))  # type: ignore[misc]
            for streams in (1, *self.options.streams):
                conditions.append(lambda length=length, streams=streams: self.decode(length, streams))  # type: ignore[misc]
        for number in range(self.options.rounds):
            say(f"round {number + 1} of {self.options.rounds}")
            shift = number * (1 + len(self.options.streams)) % len(conditions)
            for condition in conditions[shift:] + conditions[:shift]:
                await condition()

    def add_ratios(self) -> None:
        """Decode speeds over that of one stream, paired by round."""
        for length, streams in itertools.product(self.options.prompt_tokens, self.options.streams):
            pairs = zip(*(self.values[f"{length}/decode_tok_s_{count}"] for count in (streams, 1)), strict=True)
            self.values[f"{length}/decode_ratio_{streams}"] = [many / one for many, one in pairs]


def batch_ratios(service: QwenService, prompts: Prompts, options: Options) -> list[float]:
    """``generate_batch`` of ``BATCH`` prompts against the same number one by one, in turns: tokens/s over tokens/s."""
    config = GenerationConfig(max_new_tokens=options.new_tokens)

    def speed(batched: bool) -> float:
        texts = [prompts.text(options.prompt_tokens[0], overhead=False) for _ in range(BATCH)]
        begin = time.perf_counter()
        answers = service.generate_batch(texts, config) if batched else [service.generate(t, config) for t in texts]
        return sum(answer.completion_tokens for answer in answers) / (time.perf_counter() - begin)

    speed(True)
    ratios = []
    for number in range(options.rounds):
        first, second = speed(number % 2 == 0), speed(number % 2 == 1)
        ratios.append(first / second if number % 2 == 0 else second / first)
    return ratios


async def measure(
    server: LiveServer, prompts: Prompts, options: Options, stops: Collection[int], say: Callable[[str], None]
) -> Bench:
    """All figures that a client can see."""
    connections = max(*options.streams, OTHERS + 1) + 1
    async with http_client(server.url, connections=connections, timeout=PATIENCE_S) as client:
        bench = Bench(server, client, prompts, options, stops)
        await bench.all_rounds(say)
    bench.add_ratios()
    return bench


def benchmark(folder: Path, options: Options, *, threads: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Start a server of the artifact, measure it, stop it, and measure the service.

    Returns:
        ``head``: where and how; ``figures``: name to ``Figure`` or None; names as in the module's docstring.

    Raises:
        ServiceError: the server does not start, refuses, or breaks off.
    """
    prompts = Prompts(TextTokenizer(folder))
    arguments = [str(folder), *(() if threads is None else ("--threads", str(threads)))]
    with LiveServer("benchmarks.lag", arguments) as server:
        bench = asyncio.run(measure(server, prompts, options, Shape.read(folder).eos_token_ids, say))
        engine = server.get_json("/probe")["engine"]
    say("batches")
    with QwenService(folder, threads=threads, isolated=True, speculate="off") as service:
        bench.values["batch_ratio"] = batch_ratios(service, prompts, options)
    head = {
        "artifact": folder.name,
        "engine": engine.get("kind"),
        "slots": engine.get("streams"),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "threads": threads,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "prompt_tokens": bench.prompt_tokens,
    }
    return {"head": head, "figures": {name: Figure.of(values) for name, values in sorted(bench.values.items())}}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 when a bound is broken."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description="load a server and measure it over HTTP"
    )
    default = Options()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=default.streams, help="against one stream")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=default.prompt_tokens)
    parser.add_argument("--new-tokens", type=int, default=default.new_tokens)
    parser.add_argument("--system-tokens", type=int, default=default.system_tokens, help="of the shared prompt")
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument("--threads", type=int, help="of onnxruntime")
    parser.add_argument("--gate", action="append", default=[], metavar="NAME>=VALUE", help="exit 1 when it is broken")
    given = parser.parse_args(arguments)
    bounds = [Bound.parse(text) for text in given.gate]
    lengths = tuple(given.prompt_tokens)
    options = Options(tuple(given.streams), lengths, given.new_tokens, given.system_tokens, given.rounds)
    told = benchmark(given.artifact.resolve(), options, threads=given.threads, say=Console(stderr=True).print)
    return conclude(told, f"{told['head']['artifact']}, {options.new_tokens} new tokens", bounds)


if __name__ == "__main__":
    run(main)
