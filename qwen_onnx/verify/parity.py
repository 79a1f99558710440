"""Same text, same ids; same ids, same logits: what must agree exactly or nearly so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from qwen_onnx.runtime.engines.batch.model import BatchModel
from qwen_onnx.verify.corpus import Message
from qwen_onnx.verify.drift import Prepared, Scorer
from qwen_onnx.verify.scoring import Positions, compare
from qwen_onnx.verify.softmax import Logits

Case = TypeVar("Case")
Result = TypeVar("Result")

NASTY = (
    "",
    " ",
    "\n",
    "Hello, world! It's 5 o'clock; they'll've gone.",
    "two  spaces   three    four \t tab\t\ttabs  ",
    "line\nline\n\nparagraph\n\n\n\nfar\r\nwindows\r\n\r\nold mac\r",
    "  leading and trailing  \n  indented\n\tby tab\n",
    "1234567890 3.14159 1,000,000 0x1F 1e-9 ２０２６ ٣٤٥ Ⅳ ½",
    "def f(x):\n    return {k: v**2 for k, v in x.items() if not k.startswith('_')}  # ok\n",
    '{"a": [1, 2.5, null], "b": {"c": "\\u00e9\\n"}}',
    "<div class='x'>&nbsp;</div> <!-- note --> https://example.org/?q=a%20b&c=d#e",
    "naïve café Straße Ångström œuvre İstanbul",
    "nai\u0308ve cafe\u0301 A\u030angstro\u0308m n\u0303 \u1e9b\u0323",
    "ﬁ ﬂ ™ ℡ ㎏ Å Ω",
    "你好，世界！这是一个测试。繁體字：龍龜。",
    "日本語のテキスト、カタカナ、ｶﾀｶﾅ、が と か\u3099。",
    "한국어 문장입니다. \u1112\u1161\u11ab\u1100\u1173\u11af",
    "مرحبا بالعالم — שלום עולם \u200f\u202bmixed\u202c",
    "हिन्दी क्षत्रिय ไทยไม่มีวรรค தமிழ்",
    "😀👍🏽👨‍👩‍👧‍👦🏳️‍🌈🇩🇪☺️",
    "zero\u200bwidth\u200djoin\ufeffbom soft\u00adhyphen nb\u00a0space\u2028line",
    "Z͑ͫ̓ͪ̂ͫ̽a̴l̷g̸o",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𠜎 \U0010ffff",
    "control \x01\x07\x1b[31m \x7f and \x00 nul",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\n \n \n\t\n  \n",
    "'S 'RE don'T WE'LL ſ 'ſ",
    "_under_score-kebab.CamelCaseHTTPServer2XML",
)

CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "Hello"},),
    ({"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Capital of Peru?"}),
    (
        {"role": "user", "content": "Write a haiku\n\nabout  rain"},
        {"role": "assistant", "content": "Grey drops on the roof…"},
        {"role": "user", "content": "Now in 日本語, please 🙏"},
    ),
    ({"role": "system", "content": ""}, {"role": "user", "content": "  spaces kept  \n"}),
    ({"role": "user", "content": "{{ 7 * 7 }} {% raw %} <b>&amp;</b>"},),
)


@dataclass(frozen=True)
class Mismatch:
    """The first character or token where two sequences part, for the report."""

    case: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.case}: expected {self.expected}, found {self.found}"


def _clip(value: object, width: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def mismatches(
    cases: Sequence[Case], expected: Callable[[Case], Result], found: Callable[[Case], Result]
) -> list[Mismatch]:
    """The cases where the two functions differ."""
    pairs = [(case, expected(case), found(case)) for case in cases]
    return [Mismatch(_clip(case), _clip(want), _clip(got)) for case, want, got in pairs if want != got]


def decode_positions(
    decode: Callable[[Sequence[Sequence[int]]], list[Logits]],
    scorer: Callable[[], Scorer],
    prompts: Mapping[str, Sequence[int]],
    threads: int,
) -> Positions:
    """Logits through the KV cache, token by token, against those of one run over all tokens.

    All of the first come before ``scorer`` gives what computes the second: one of them at a time is in memory.
    """
    texts = list(prompts.values())
    decoded = decode(texts)
    at_once = scorer()
    if isinstance(at_once, Prepared):
        at_once.prepare(texts)
    pairs = zip(texts, decoded, strict=True)
    return Positions.join([compare(at_once.logits(ids), rows, ids, threads) for ids, rows in pairs])


# steps by which each text joins a batch later than the one before it
STAGGER = 7


def batched_logits(folder: Path, texts: Sequence[Sequence[int]], threads: int | None) -> list[Logits]:
    """Logits after each token of texts that share the steps of one batch, float32 [tokens, vocab_size] each.

    Raises:
        UnsupportedGraphError: the graph cannot be run by rows.
    """
    model = BatchModel(folder, rows=len(texts), capacity=max(map(len, texts)) + 1, threads=threads)
    done: list[list[np.ndarray[Any, Any]]] = [[] for _ in texts]
    step = 0
    while waiting := [row for row, text in enumerate(texts) if len(done[row]) < len(text)]:
        joined = [row for row in waiting if row * STAGGER <= step]
        step += 1
        if not joined:
            continue
        first, last = joined[0], joined[-1]
        tokens = np.zeros((last - first + 1, 1), np.int64)
        for row in joined:
            tokens[row - first] = texts[row][len(done[row])]
        idle = set(range(first, last + 1)) - set(joined)
        logits = model.extend(first, tokens, [len(rows) for rows in done[first : last + 1]], idle=idle)
        for row in joined:
            done[row].append(logits[row - first].copy())
    return [np.stack(rows) for rows in done]
