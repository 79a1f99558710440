"""Conversations become token ids with the loss on answers alone, by the model's own template and tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from qwen_onnx.errors import TrainingError
from qwen_onnx.finetune.data import Example, Faults, Message, Retained

# what PyTorch's cross-entropy passes over
IGNORED = -100

Render = Callable[..., str]


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row, and the same again as labels where a token belongs to an answer, else ``IGNORED``."""

    line: int
    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Rows:
    """What a training reads.

    Attributes:
        learnt: rows of examples; ``held_out``, those that it is judged by.
        retained: rows on which the model stays what it was; ``retained_out``, those that show whether it did.
    """

    learnt: list[Encoded]
    held_out: list[Encoded]
    retained: list[Encoded] = field(default_factory=list)
    retained_out: list[Encoded] = field(default_factory=list)


def encode(
    examples: Iterable[Example],
    render: Render,
    tokenizer: Any,
    *,
    window: int,
    longer: Literal["refuse", "truncate", "skip"],
    path: Path,
) -> tuple[list[Encoded], list[str]]:
    """Rows of at most ``window`` tokens.

    Args:
        render: a conversation to text; with ``prompt=True`` up to the opening of an answer.
        tokenizer: of transformers, a fast one, which says where in the text a token begins.
        path: of the file, for messages.

    Returns:
        The rows, and what is to be told about those that were too long.

    Raises:
        TrainingError: an example is too long and ``longer`` says refuse; the template shows no place for an answer;
            no row is left. All lines are told together.
    """
    rows: list[Encoded] = []
    faults, cut, left_out = Faults(path), set[int](), set[int]()
    for example in examples:
        try:
            pieces = _pieces(example.messages, render)
        except TrainingError as error:
            faults.add(example.line, error.what)
            continue
        for text, spans in pieces:
            row = _row(example.line, text, spans, tokenizer)
            if len(row.ids) <= window:
                rows.append(row)
                continue
            shorter = Encoded(row.line, row.ids[:window], row.labels[:window])
            if longer == "refuse":
                faults.add(row.line, f"{len(row.ids):,} tokens, a window holds {window:,}")
            elif longer == "truncate" and any(label != IGNORED for label in shorter.labels):
                cut.add(row.line)
                rows.append(shorter)
            else:
                left_out.add(row.line)
    faults.require_none(
        "cannot be encoded", "--set window=… for longer ones, --set longer=truncate or --set longer=skip"
    )
    notes = [f"too long for the window of {window:,} tokens, cut: {_listed(cut)}"] if cut else []
    notes += [f"too long for the window of {window:,} tokens, left out: {_listed(left_out)}"] if left_out else []
    if not rows:
        raise TrainingError("no example is left to learn from", where=str(path), hint="; ".join(notes) or None)
    return rows, notes


def encode_retained(
    retained: Iterable[Retained], render: Render, tokenizer: Any, *, window: int, path: Path
) -> list[Encoded]:
    """Rows of at most ``window`` tokens, every one of which counts; a longer text gives several.

    Args:
        render, tokenizer, path: as ``encode`` takes them.

    Raises:
        TrainingError: the template refuses a conversation. All lines are told together.
    """
    rows: list[Encoded] = []
    faults = Faults(path)
    for line in retained:
        try:
            text = line.said if isinstance(line.said, str) else render(line.said)
        except TrainingError as error:
            faults.add(line.line, error.what)
            continue
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        pieces = [ids[begin : begin + window] for begin in range(0, len(ids), window)]
        rows += [Encoded(line.line, piece, piece) for piece in pieces]
    faults.require_none("cannot be retained", "the model's chat template must render them")
    return rows


def split(rows: Sequence[Encoded], share: float, seed: int, path: Path) -> tuple[list[Encoded], list[Encoded]]:
    """Rows to learn from, and ``share`` of them held out; rows of one line, or of the same ids, stay together.

    Raises:
        TrainingError: either would be empty.
    """
    same: dict[tuple[int, ...], int] = {}
    of_line: dict[int, int] = {}
    groups: dict[int, list[Encoded]] = {}
    for row in rows:
        group = of_line.setdefault(row.line, same.setdefault(tuple(row.ids), row.line))
        groups.setdefault(group, []).append(row)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    count = max(1, round(share * len(order)))
    if count >= len(order):
        raise TrainingError(
            f"{len(order)} different example{'s' if len(order) > 1 else ''}: {count} held out, none left to learn from",
            where=str(path),
            hint="give more examples",
        )
    held = set(order[:count])
    parts = [[row for line in groups if (line in held) is out for row in groups[line]] for out in (False, True)]
    return parts[0], parts[1]


def _pieces(messages: Sequence[Message], render: Render) -> list[tuple[str, list[tuple[int, int]]]]:
    """Texts, each with the stretches of its answers.

    One text where every turn stands in it as it stood when it was the last; else one for each answer, as templates
    need that drop the reasoning of earlier turns.
    """
    turns = []
    for place, turn in enumerate(messages):
        if turn["role"] == "assistant":
            before, opened = render(messages[:place]), render(messages[:place], prompt=True)
            after = render(messages[: place + 1])
            if not after.startswith(before):
                raise TrainingError("the chat template writes a question otherwise once it is answered")
            turns.append((after, (_alike(opened, after), len(after))))
    whole = turns[-1][0]
    if all(whole.startswith(after) for after, _ in turns):
        return [(whole, [span for _, span in turns])]
    return [(after, [span]) for after, span in turns]


def _alike(one: str, other: str) -> int:
    """Characters that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _row(line: int, text: str, spans: Sequence[tuple[int, int]], tokenizer: Any) -> Encoded:
    told = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(begin <= start < end for begin, end in spans) else IGNORED
        for token, (start, _) in zip(told["input_ids"], told["offset_mapping"], strict=True)
    ]
    return Encoded(line, list(told["input_ids"]), labels)


def _listed(lines: set[int]) -> str:
    shown = ", ".join(map(str, sorted(lines)[:20]))
    return f"line{'s' if len(lines) > 1 else ''} {shown}" + (f" and {len(lines) - 20} more" if len(lines) > 20 else "")
