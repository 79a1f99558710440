"""What the exams of all trainings share: asking a server, and a table of right answers with their bounds."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.shares import wilson

# how to start what does not answer
HINT = "start it: qwen-onnx serve ARTIFACT"


def model_of(server: str) -> str:
    """The name of the server's first model."""
    return str(_json(f"{server}/v1/models")["data"][0]["id"])


def answer_of(server: str, model: str, part: dict[str, Any], question: str, most_tokens: int) -> str:
    """What the server says, greedily, to a question about a picture or a sound, ``part`` of the message."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": [part, {"type": "text", "text": question}]}],
        "temperature": 0,
        "max_tokens": most_tokens,
    }
    found = _json(f"{server}/v1/chat/completions", body)
    return str(found["choices"][0]["message"]["content"])


def _json(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def table(results: Mapping[str, Sequence[bool]], what: str) -> str:
    """Right answers by kind, with 95 % bounds."""
    lines = [f"{what:<16}{'right':>6}{'asked':>7}{'share':>9}  95 % bounds"]
    return "\n".join(lines + [_line(kind, found) for kind, found in results.items() if found])


def _line(name: str, results: Sequence[bool]) -> str:
    low, high = wilson(sum(results), len(results))
    share = f"{sum(results) / len(results):.1%}"
    return f"{name:<16}{sum(results):>6}{len(results):>7}{share:>9}  [{low:.1%}, {high:.1%}]"


def told(results: Mapping[str, Sequence[bool]]) -> dict[str, dict[str, int]]:
    """The same for machines."""
    return {kind: {"right": sum(found), "asked": len(found)} for kind, found in results.items()}
