"""Many kinds of requests for a long time: does the server keep its memory, its statuses and its promises?

``python -m benchmarks.soak ARTIFACT [--minutes 15] [--clients 6]`` runs ``qwen-onnx serve`` in a process of its
own. Exit 1 when its memory grows by more than ``--most-growth`` percent after warm-up, when a status comes that the
request does not deserve, when an answer breaks off or hangs, or when the server does not end with 0 on SIGTERM.

Memory is the resident set of the server and all its children, sampled twice a second. The warm-up, the first fifth, is
left out. Growth is the median of the last tenth of the samples over that of the first tenth after warm-up; the slope is
Theil and Sen's (the median over all pairs), which single peaks do not move.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.live import LiveServer, http_client, stream_chat
from qwen_onnx.errors import run

if TYPE_CHECKING:
    import httpx

PATIENCE_S = 120.0
SAMPLE_S = 0.5
WARM_UP = 0.2
CHAT = "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
# a sound request may be turned away under load, and is told so
SOUND = frozenset({200, 429, 503})
REFUSED = frozenset({400, 404, 405, 413, 415, 422, 429})

BAD: tuple[bytes, ...] = (
    b"{",
    b"[]",
    b"\xff\xfe",
    b'{"model": "MODEL"}',
    b'{"model": "MODEL", "messages": []}',
    b'{"model": "MODEL", "messages": [{"role": "robot", "content": "x"}]}',
    b'{"model": "MODEL", "messages": [{"role": "user", "content": "x"}], "typo": 1}',
    b'{"model": "MODEL", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    b'{"model": "MODEL", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}',
    b"[" * 20_000,
)


@dataclass
class Tally:
    """What came back, by kind of request."""

    statuses: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    faults: list[str] = field(default_factory=list)
    hung: int = 0
    tokens: int = 0

    def note(self, kind: str, status: int, expected: frozenset[int], fault: str | None = None) -> None:
        """Count a status, and keep what is wrong with it."""
        self.statuses[kind][status] += 1
        if status not in expected:
            self.faults.append(f"{kind}: status {status}: {(fault or '')[:200]}")
        elif status == 200 and fault:
            self.faults.append(f"{kind}: {fault[:200]}")


class Load:
    """Requests of every kind that the server's OpenAPI schema knows, drawn by a seeded generator."""

    def __init__(self, client: httpx.AsyncClient, model: str, fields: frozenset[str], clients: int) -> None:
        self.client, self.model, self.clients = client, model, clients
        self.tally = Tally()
        self.kinds = ["whole", "long", "streamed", "seeded", "stopped", "hang-up", "bad", "burst"]
        self.kinds += [kind for kind, name in (("many", "n"), ("json", "response_format")) if name in fields]

    def body(self, rng: random.Random, **changes: Any) -> dict[str, Any]:
        """A short chat about a number."""
        messages = [{"role": "user", "content": f"{rng.randrange(10**6)}: say something about this number."}]
        return {"model": self.model, "messages": messages, "max_tokens": rng.randrange(4, 48), **changes}

    async def whole(self, kind: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """A completion in one piece, checked for what any answer must hold; None when it was turned away."""
        response = await self.client.post(CHAT, json=body)
        if response.status_code != 200:
            self.tally.note(kind, response.status_code, SOUND, response.text)
            return None
        told: dict[str, Any] = response.json()
        used = told["usage"]["completion_tokens"]
        self.tally.tokens += used
        most = body["max_tokens"] * body.get("n", 1)
        wrong = f"{used} tokens, at most {most} were asked for" if used > most else None
        wrong = wrong or (None if len(told["choices"]) == body.get("n", 1) else f"{len(told['choices'])} choices")
        self.tally.note(kind, 200, SOUND, wrong)
        return told

    async def streamed(self, kind: str, body: dict[str, Any], pieces: int | None = None) -> None:
        """A stream, to its end or until ``pieces`` pieces have come."""
        answer = await stream_chat(self.client, body, None if pieces is None else lambda count: count < pieces)
        self.tally.tokens += int(answer.usage.get("completion_tokens", len(answer.arrivals)))
        fault = answer.fault
        if not fault and answer.status == 200 and pieces is None and answer.finish_reason is None:
            fault = "no finish_reason"
        self.tally.note(kind, answer.status, SOUND, fault)

    async def one(self, kind: str, rng: random.Random) -> None:
        """A request of this kind."""
        if kind == "bad":
            content = rng.choice(BAD).replace(b"MODEL", self.model.encode())
            response = await self.client.post(CHAT, content=content, headers={"content-type": "application/json"})
            self.tally.note(kind, response.status_code, REFUSED, response.text)
        elif kind == "burst":
            bodies = [self.body(rng, max_tokens=4) for _ in range(self.clients)]
            await asyncio.gather(*(self.whole(kind, body) for body in bodies))
        elif kind == "hang-up":
            await self.streamed(kind, self.body(rng, max_tokens=400), rng.randrange(1, 12))
        elif kind == "streamed":
            await self.streamed(kind, self.body(rng, temperature=0.8))
        elif kind == "json":
            schema = {"type": "json_schema", "json_schema": {"name": "number", "schema": SCHEMA, "strict": True}}
            await self.whole(kind, self.body(rng, response_format=schema))
        elif kind == "long":
            words = "All work and no play makes a long prompt. " * rng.randrange(10, 60)
            await self.whole(kind, self.body(rng, messages=[{"role": "user", "content": words}]))
        else:
            changes: dict[str, dict[str, Any]] = {
                "whole": {"temperature": 0},
                "seeded": {"temperature": 1.0, "seed": rng.randrange(4)},
                "stopped": {"stop": ["a", "\n"]},
                "many": {"n": 2, "temperature": 1.0},
            }
            await self.whole(kind, self.body(rng, **changes[kind]))

    async def user(self, number: int, deadline: float) -> None:
        """One request after the other until the time is over; one that hangs or breaks is noted."""
        import httpx

        rng = random.Random(number)
        while time.monotonic() < deadline:
            kind = rng.choice(self.kinds)
            try:
                await self.one(kind, rng)
            except httpx.TimeoutException as error:
                self.tally.hung += 1
                self.tally.faults.append(f"{kind}: hung for {PATIENCE_S:g} s: {type(error).__name__}")
            except httpx.HTTPError as error:
                self.tally.faults.append(f"{kind}: {type(error).__name__}: {error}")


@dataclass(frozen=True)
class Memory:
    """Resident bytes after warm-up, and what became of them."""

    first_bytes: float
    last_bytes: float
    growth_percent: float
    slope_percent_per_hour: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[tuple[float, int]]) -> Memory:
        """From (seconds, bytes) since the start, the warm-up included."""
        kept = np.asarray(samples[int(len(samples) * WARM_UP) :], dtype=float)
        tenth = max(len(kept) // 10, 1)
        first, last = float(np.median(kept[:tenth, 1])), float(np.median(kept[-tenth:, 1]))
        # a few hundred points are enough, and their pairs fit into memory
        points = kept[:: max(len(kept) // 400, 1)]
        earlier, later = np.triu_indices(len(points), k=1)
        seconds = points[later, 0] - points[earlier, 0]
        slopes = (points[later, 1] - points[earlier, 1]) / seconds
        slope = float(np.median(slopes)) * 3600 if len(slopes) else 0.0
        return cls(first, last, (last / first - 1) * 100, slope / first * 100, len(samples))


async def soak(server: LiveServer, minutes: float, clients: int) -> tuple[Tally, Memory]:
    """Load the server with ``clients`` users and watch its memory."""
    openapi = server.get_json("/openapi.json")["components"]["schemas"]
    fields = frozenset(openapi.get("ChatRequest", {}).get("properties", ()))
    begin = time.monotonic()
    samples: list[tuple[float, int]] = []

    async def watch() -> None:
        while True:
            samples.append((time.monotonic() - begin, await asyncio.to_thread(server.resident_bytes)))
            await asyncio.sleep(SAMPLE_S)

    async with http_client(server.url, connections=clients * (clients + 1), timeout=PATIENCE_S) as client:
        load = Load(client, server.model, fields, clients)
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(load.user(number, begin + minutes * 60) for number in range(clients)))
        watching.cancel()
        # it must still serve, and serve everybody, when the load is gone
        answer = await client.post(CHAT, json=load.body(random.Random(0)))
        fault = None if answer.status_code == 200 else answer.text
        load.tally.note("afterwards", answer.status_code, frozenset({200}), fault)
    return load.tally, Memory.of(samples)


def show(tally: Tally, memory: Memory, console: Console) -> None:
    """Statuses by kind, then memory."""
    table = Table("request", "statuses", title=f"{sum(sum(c.values()) for c in tally.statuses.values())} requests")
    for kind, counts in sorted(tally.statuses.items()):
        table.add_row(kind, ", ".join(f"{status}: {count}" for status, count in sorted(counts.items())))
    console.print(table)
    first, last = (value / 2**20 for value in (memory.first_bytes, memory.last_bytes))
    console.print(f"resident: {first:.1f} MiB after warm-up, {last:.1f} MiB at the end, {memory.growth_percent:+.2f} %")
    console.print(f"slope: {memory.slope_percent_per_hour:+.2f} % an hour; hung: {tally.hung}")
    for fault, count in Counter(tally.faults).most_common(20):
        console.print(f"fault ({count}×): {fault}", markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 when something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="load a server for long")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--most-growth", type=float, default=3.0, help="percent")
    parser.add_argument("--serve-option", action="append", default=[], help="for qwen-onnx serve, e.g. --threads=1")
    given = parser.parse_args(arguments)
    server = LiveServer("qwen_onnx.cli.app", ["serve", str(given.artifact), *given.serve_option])
    with server:
        tally, memory = asyncio.run(soak(server, given.minutes, given.clients))
        code = server.stop()
    show(tally, memory, Console())
    print(f"exit code of the server on SIGTERM: {code}")
    told = {
        "artifact": given.artifact.name,
        "minutes": given.minutes,
        "clients": given.clients,
        "statuses": {kind: dict(counts) for kind, counts in sorted(tally.statuses.items())},
        "tokens": tally.tokens,
        "hung": tally.hung,
        "faults": len(tally.faults),
        "exit_code": code,
        "resident_first_bytes": memory.first_bytes,
        "resident_last_bytes": memory.last_bytes,
        "growth_percent": memory.growth_percent,
        "slope_percent_per_hour": memory.slope_percent_per_hour,
    }
    print(json.dumps(told))
    return 1 if tally.faults or code != 0 or memory.growth_percent > given.most_growth else 0


if __name__ == "__main__":
    run(main)
