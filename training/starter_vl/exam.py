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
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from training.asking import HINT, answer_of, model_of, table, told
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


def answer_to(server: str, model: str, item: Item) -> str:
    """What the server says."""
    picture = base64.b64encode(item.png).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    return answer_of(server, model, part, item.asked.question, MOST_TOKENS)


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
        model = model_of(server)
        for item in items(options.pictures, fonts):
            answer = answer_to(server, model, item)
            results[item.asked.kind].append(right := item.asked.is_right(answer))
            if not right and options.show:
                options.show -= 1
                print(f"seed {item.seed}: {item.asked.question} → {answer!r}, right: {item.asked.fact}")
    except (urllib.error.URLError, OSError) as error:
        print(f"the server does not answer: {error}; {HINT}", file=sys.stderr)
        return 1
    every = [right for kind in KINDS for right in results[kind]]
    print(table({kind: results[kind] for kind in KINDS} | {"all": every}, "kind"))
    share = sum(every) / len(every)
    print(json.dumps({"model": model, "pictures": len(every), "share": round(share, 4), "kinds": told(results)}))
    return 0 if share >= options.least else 1


if __name__ == "__main__":
    sys.exit(main())
