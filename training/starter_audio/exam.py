"""Ask a server about spoken digits that nobody trained on, and count the right answers.

    python -m training.starter_audio.exam http://127.0.0.1:8000

Seeds, voices, speeds, pitches and wordings are others than those of the training, and flite's voices are those of
another program. An answer is right when the digits that it names are those that were said, in their order, and no more.
Prints a table by voices and number of digits with 95 % bounds (Wilson), and last one line of JSON.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import re
import sys
import urllib.error
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from qwen_onnx.artifact.audio_config import AudioSettings
from training.asking import HINT, answer_of, model_of, table, told
from training.starter_audio.language import QUESTIONS
from training.starter_audio.sounds import DIGITS, SETTINGS, Samples, Split, as_file, recorded, said

# far from the seeds of the training
FIRST_SEED = 900_000_000
MOST_TOKENS = 32
SPLITS: tuple[Split, ...] = ("exam", "flite")
NAMES = {"exam": "espeak-ng", "flite": "flite"}


@dataclass(frozen=True)
class Item:
    """A sound with one question; ``seed`` makes both again."""

    seed: int
    voice: str
    samples: Samples
    digits: tuple[int, ...]
    question: str
    settings: AudioSettings = SETTINGS


def items(count: int, split: Split, first: int = FIRST_SEED) -> Iterator[Item]:
    """``count`` sounds with a question each."""
    for seed in range(first, first + count):
        one = said(seed, split)
        yield Item(seed, one.voice, recorded(one), one.digits, question_of(seed))


def question_of(seed: int) -> str:
    """One of the exam's wordings."""
    return random.Random(seed).choice(QUESTIONS["exam"])


def digits_of(answer: str) -> tuple[int, ...]:
    """The digits that an answer names, as words or figures."""
    found = re.findall(rf"\b(?:{'|'.join(DIGITS)})\b|\d", answer.lower())
    return tuple(DIGITS.index(one) if one in DIGITS else int(one) for one in found)


def in_place(digits: Sequence[int], named: Sequence[int]) -> list[bool]:
    """Of each digit that was said, whether the answer names it in its order."""
    found = [False] * len(digits)
    for block in SequenceMatcher(None, digits, named, autojunk=False).get_matching_blocks():
        found[block.a : block.a + block.size] = [True] * block.size
    return found


def ask(server: str, model: str, content: bytes, form: str, question: str) -> str:
    """What the server says to a question about a sound."""
    data = base64.b64encode(content).decode()
    part: dict[str, Any] = {"type": "input_audio", "input_audio": {"data": data, "format": form}}
    return answer_of(server, model, part, question, MOST_TOKENS)


def exam(server: str, sounds: int, show: int) -> tuple[str, dict[str, list[bool]]]:
    """The model's name, and right answers by voices and number of digits."""
    model, results = model_of(server), defaultdict[str, list[bool]](list)

    def count(name: str, label: str, digits: tuple[int, ...], answer: str) -> None:
        nonlocal show
        named = digits_of(answer)
        for kind in (f"{name} {len(digits)}", name):
            results[kind].append(named == digits)
        results[f"{name} digits"] += in_place(digits, named)
        if named != digits and show:
            show -= 1
            print(f"{label}: {answer!r}, right: {' '.join(map(str, digits))}")

    for split in SPLITS:
        for item in items(sounds, split):
            answer = ask(server, model, as_file(item.samples), "wav", item.question)
            count(NAMES[split], f"seed {item.seed}, {item.voice}, {item.question}", item.digits, answer)
    return model, results


def main() -> int:
    """Exit 1 when fewer sequences are right, of any voices, than ``--least`` asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="address of qwen-onnx serve, e.g. http://127.0.0.1:8000")
    parser.add_argument("--sounds", type=int, default=200, help="of each program's voices")
    parser.add_argument("--least", type=float, default=0.0, help="share of right answers that is needed")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print")
    options: Any = parser.parse_args()
    try:
        model, results = exam(options.server.rstrip("/"), options.sounds, options.show)
    except (urllib.error.URLError, OSError) as error:
        print(f"the server does not answer: {error}; {HINT}", file=sys.stderr)
        return 1
    ordered = {kind: results[kind] for kind in sorted(results)}
    print(table(ordered, "voices, digits"))
    print(json.dumps({"model": model, "kinds": told(ordered)}))
    whole = [found for kind, found in ordered.items() if " " not in kind]
    return 0 if all(sum(found) >= options.least * len(found) for found in whole) else 1


if __name__ == "__main__":
    sys.exit(main())
