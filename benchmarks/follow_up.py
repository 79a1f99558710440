"""How long a question about a picture waits when the picture was seen before, measured over HTTP.

``python -m benchmarks.follow_up ARTIFACT [--side 896] [--rounds 7] [--gate 'follow_up_ratio<=0.25']``

Every round draws a picture that the server has never seen and asks of it, one after the other; ratios are paired within
the round, with ``first``. Times are a client's, to the first token: they include HTTP, decoding and resizing.

* ``first_ttft_ms``: a question about the picture.
* ``follow_up``: that question, its answer and another question: the prefix cache has the picture's tokens.
* ``other_beginning``: the picture behind a system prompt of its own: its tokens are computed again, and the encoder's
  features are found.
* ``unseen``: the conversation of ``follow_up`` with a picture that the server has never seen: what it would cost if
  nothing were remembered.
* ``follow_up_cached_tokens`` of ``prompt_tokens`` came from the prefix cache.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from benchmarks.figures import Bound, Figure, conclude
from benchmarks.live import Answer, LiveServer, http_client, stream_chat
from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.errors import ConfigError, ServiceError, run

if TYPE_CHECKING:
    import httpx

PATIENCE_S = 600.0
NEW_TOKENS = 8
SEED = 20261129
FIRST, SECOND = "What does this picture show?", "And what is in the middle of it?"
SYSTEM = "Answer in one word."


def photograph(side: int, seed: int) -> str:
    """A data URI of a JPEG of ``side`` × ``side`` pixels: soft light in three colours, and grain."""
    from PIL import Image

    random = np.random.default_rng((SEED, seed))
    coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    grain = random.normal(0, 6, (side, side, 1))
    file = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def asked(picture: str, question: str) -> dict[str, Any]:
    """A message of the user."""
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
    return {"role": "user", "content": parts}


class FollowUps:
    """The rounds, and their times."""

    def __init__(self, client: httpx.AsyncClient, model: str, side: int) -> None:
        self._client, self._model, self._side = client, model, side
        self._drawn = 0
        self.values: dict[str, list[float]] = defaultdict(list)

    def _new(self) -> str:
        self._drawn += 1
        return photograph(self._side, self._drawn)

    async def _ask(self, *messages: dict[str, Any]) -> Answer:
        """One streamed greedy answer; ServiceError when the server refuses, breaks off or says nothing."""
        body = {"model": self._model, "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}
        answer = await stream_chat(self._client, body)
        if answer.fault or not answer.arrivals:
            raise ServiceError(f"the server answers {answer.status}: {answer.fault or 'nothing'}")
        return answer

    async def round(self) -> None:
        """One new picture, and one more for the control."""
        picture = self._new()
        first = await self._ask(asked(picture, FIRST))
        behind = [{"role": "assistant", "content": first.text}, {"role": "user", "content": SECOND}]
        times = {"first": first}
        times["follow_up"] = await self._ask(asked(picture, FIRST), *behind)
        times["other_beginning"] = await self._ask({"role": "system", "content": SYSTEM}, asked(picture, FIRST))
        times["unseen"] = await self._ask(asked(self._new(), FIRST), *behind)
        for name, answer in times.items():
            self.values[f"{name}_ttft_ms"].append(answer.ttft * 1000)
            if name != "first":
                self.values[f"{name}_ratio"].append(answer.ttft / first.ttft)
        usage = times["follow_up"].usage
        self.values["prompt_tokens"].append(usage["prompt_tokens"])
        self.values["follow_up_cached_tokens"].append(usage["prompt_tokens_details"]["cached_tokens"])


async def measure(server: LiveServer, side: int, rounds: int, say: Callable[[str], None]) -> dict[str, list[float]]:
    """Values of all rounds but the first, which warms up."""
    async with http_client(server.url, connections=1, timeout=PATIENCE_S) as client:
        bench = FollowUps(client, server.model, side)
        await bench.round()
        bench.values.clear()
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            await bench.round()
    return bench.values


def benchmark(
    folder: Path, *, side: int, rounds: int, threads: int | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Start a server of the artifact, measure it, stop it.

    Returns:
        ``head``: where and how; ``figures``: name to ``Figure`` or None; names as in the module's docstring.

    Raises:
        ConfigError: the artifact reads no pictures. ServiceError: the server does not start, refuses, or breaks off.
    """
    if GenaiConfig.read(folder).model.vision is None:
        raise ConfigError([f"{folder}: reads no pictures"], hint="build a model that sees, see docs/vision.md")
    arguments = [str(folder), *(() if threads is None else ("--threads", str(threads)))]
    with LiveServer("benchmarks.lag", arguments) as server:
        values = asyncio.run(measure(server, side, rounds, say))
    head = {
        "artifact": folder.name,
        "side": side,
        "rounds": rounds,
        "threads": threads,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    return {"head": head, "figures": {name: Figure.of(found) for name, found in sorted(values.items())}}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 when a bound is broken."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.follow_up", description="time to the first token of questions about one picture"
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--side", type=int, default=896, help="pixels of a side of the picture")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of onnxruntime")
    parser.add_argument("--gate", action="append", default=[], metavar="NAME<=VALUE", help="exit 1 when it is broken")
    given = parser.parse_args(arguments)
    bounds = [Bound.parse(text) for text in given.gate]
    told = benchmark(
        given.artifact.resolve(),
        side=given.side,
        rounds=given.rounds,
        threads=given.threads,
        say=Console(stderr=True).print,
    )
    return conclude(told, f"{told['head']['artifact']}, pictures of {given.side} × {given.side}", bounds)


if __name__ == "__main__":
    run(main)
