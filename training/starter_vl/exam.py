"""Ask a server about pictures that nobody trained on, and count the right answers.

    python -m training.starter_vl.exam http://127.0.0.1:8000 --fonts FOLDER

Seeds, sizes, fonts and wordings are others than those of the training. Prints a table by kind of question with 95 %
bounds (Wilson), and last one line of JSON.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import sys
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shares import wilson
from training.starter_vl.fonts import EXAM, fonts_in
from training.starter_vl.questions import KINDS, Asked, ask
from training.starter_vl.scenes import SIDES, draw, scene, side_of

# far from the seeds of the training, which count upwards from others
FIRST_SEED = 900_000_000
MOST_TOKENS = 16


@dataclass(frozen=True)
class Item:
    """A picture with one question; ``seed`` makes both again."""

    seed: int
    png: bytes
    asked: Asked


def items(count: int, fonts: list[str], first: int = FIRST_SEED) -> Iterator[Item]:
    """``count`` pictures with a question each, as many of one kind as of another as far as the scenes have them."""
    wanted = dict.fromkeys(KINDS, 0)
    for seed in range(first, first + count):
        shown = scene(seed)
        chance = random.Random(seed)
        asked = min(ask(shown, chance, exam=True), key=lambda found: wanted[found.kind])
        wanted[asked.kind] += 1
        content = io.BytesIO()
        draw(shown, side_of(seed, SIDES[1]), fonts).save(content, "PNG")
        yield Item(seed, content.getvalue(), asked)


def answer_of(server: str, model: str, item: Item) -> str:
    """What the server says, greedily."""
    picture = base64.b64encode(item.png).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": item.asked.question},
    ]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": MOST_TOKENS,
    }
    found = _json(f"{server}/v1/chat/completions", body)
    return str(found["choices"][0]["message"]["content"])


def _json(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def _line(name: str, results: list[bool]) -> str:
    low, high = wilson(sum(results), len(results))
    share = f"{sum(results) / len(results):.1%}"
    return f"{name:<10}{sum(results):>6}{len(results):>7}{share:>9}  [{low:.1%}, {high:.1%}]"


def main() -> int:
    """Exit 1 when fewer answers are right than ``--least`` asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="address of qwen-onnx serve, e.g. http://127.0.0.1:8000")
    parser.add_argument("--fonts", type=Path, help="folder that pip put the font packages into; else Pillow's own font")
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--least", type=float, default=0.0, help="share of right answers that is needed")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print")
    options = parser.parse_args()
    fonts = fonts_in(options.fonts, EXAM) if options.fonts else [""]
    server = options.server.rstrip("/")
    results: dict[str, list[bool]] = defaultdict(list)
    try:
        model = _json(f"{server}/v1/models")["data"][0]["id"]
        for item in items(options.pictures, fonts):
            answer = answer_of(server, model, item)
            results[item.asked.kind].append(right := item.asked.is_right(answer))
            if not right and options.show:
                options.show -= 1
                print(f"seed {item.seed}: {item.asked.question} → {answer!r}, right: {item.asked.fact}")
    except (urllib.error.URLError, OSError) as error:
        print(f"the server does not answer: {error}; start it: qwen-onnx serve ARTIFACT", file=sys.stderr)
        return 1
    every = [right for kind in KINDS for right in results[kind]]
    print(f"{'kind':<10}{'right':>6}{'asked':>7}{'share':>9}  95 % bounds")
    for kind in KINDS:
        if results[kind]:
            print(_line(kind, results[kind]))
    print(_line("all", every))
    told = {kind: {"right": sum(found), "asked": len(found)} for kind, found in results.items()}
    share = sum(every) / len(every)
    print(json.dumps({"model": model, "pictures": len(every), "share": round(share, 4), "kinds": told}))
    return 0 if share >= options.least else 1


if __name__ == "__main__":
    sys.exit(main())
