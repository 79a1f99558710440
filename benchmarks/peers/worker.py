"""The child: ``python -m benchmarks.peers.worker BACKEND SETTINGS``, in whatever environment the backend needs.

Reads lines of JSON and answers each with one. Only the clock of this process counts, so that pipes and JSON are not
part of the measurement.

* ``{"do": "logits", "ids": [...]}``: ``{"shape": [tokens, vocabulary]}``, and behind the line the float32 numbers.
* ``{"do": "run", "prompts": [[...], ...], "new_tokens": N}``: ``{"arrivals": [[...], ...]}``, for each prompt the
  seconds from the request to each of its N tokens.
* ``{"do": "memory"}``: ``{"peak_rss": bytes}``.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_onnx.processes.children import Answers
from qwen_onnx.processes.peak import peak_rss

Logits = npt.NDArray[np.float32]
Score = Callable[[Sequence[int]], Logits]
Run = Callable[[Sequence[Sequence[int]], int], list[list[float]]]


@dataclass(frozen=True)
class Settings:
    """What a backend loads.

    Args:
        model: the model's file or folder.
        threads: of the engine, for prompts and for decoding.
        streams: prompts at once; 0: logits are asked for, and no tokens.
        capacity: tokens of a stream, prompt and answer; of a text whose logits are asked for.
    """

    model: str
    threads: int
    streams: int
    capacity: int

    def as_json(self) -> str:
        """For the command line of the child."""
        return json.dumps(asdict(self))


class Clock:
    """Arrivals of tokens, in seconds since it was made."""

    def __init__(self, streams: int) -> None:
        self._start = time.perf_counter()
        self.arrivals: list[list[float]] = [[] for _ in range(streams)]

    def arrived(self, stream: int, tokens: int = 1) -> None:
        """``tokens`` came at once."""
        self.arrivals[stream] += [time.perf_counter() - self._start] * tokens


def obey(command: dict[str, Any], score: Score | None, run: Run | None, answers: Answers) -> None:
    """Answer one command."""
    if command["do"] == "logits" and score:
        found = np.ascontiguousarray(score(command["ids"]), dtype=np.float32)
        answers.say({"shape": list(found.shape)}, found.tobytes())
    elif command["do"] == "run" and run:
        answers.say({"arrivals": run(command["prompts"], command["new_tokens"])})
    elif command["do"] == "memory":
        answers.say({"peak_rss": peak_rss()})
    else:
        raise ValueError(f"this process does not do {command['do']!r}")


def main(backend: str, settings: str) -> int:
    """Load, say how long it took, then obey until standard input ends."""
    answers = Answers()
    started = time.perf_counter()
    try:
        module = importlib.import_module(f"benchmarks.peers.{backend}")
        chosen = Settings(**json.loads(settings))
        score = module.scorer(chosen) if chosen.streams == 0 else None
        run = module.runner(chosen) if chosen.streams else None
        answers.say({"load_s": time.perf_counter() - started})
        for command in answers.questions():
            obey(command, score, run, answers)
    except Exception as error:  # noqa: BLE001 - engines raise what they like; the parent makes it a typed error
        answers.fail(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
