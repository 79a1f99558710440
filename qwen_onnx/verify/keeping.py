"""What a verification keeps for later ones on other devices: the golden file, made while the teacher is at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qwen_onnx.processes.progress import progress
from qwen_onnx.verify.golden import About, Encoded, Golden, Rendered, Stretch, kept
from qwen_onnx.verify.parity import CONVERSATIONS, NASTY
from qwen_onnx.verify.senses import token_of
from qwen_onnx.verify.softmax import Logits

if TYPE_CHECKING:
    from qwen_onnx.verify.context import Context

# times that the teacher reads what the artifact drafted: a model of 7B takes minutes for each
MOST_PASSES = 4
CONTINUATION = "continuation"


@dataclass(frozen=True)
class Keep:
    """Where the golden file goes, and what it is of.

    Attributes:
        folder: of the artifact that is being made.
        model: the plan's name of it.
        weights: digest of the checkpoint's files of weights.
    """

    folder: Path
    model: str
    weights: str


def golden_of(context: Context, keep: Keep) -> Golden:
    """The golden file of a verification that has measured its drift and still has the teacher."""
    progress("keeping the teacher's answers")
    found, truth = context.study.golden, context.truth
    assert found is not None
    stretches = [
        Stretch(domain=window.domain, source=window.source, tokens=len(window.ids)) for window in found.windows
    ]
    parts = list(found.parts)
    for prompt, ids in _continuations(context):
        stretches.append(Stretch(domain=CONTINUATION, source="greedy", tokens=len(ids), prompt=prompt))
        parts.append(kept(context.teacher.logits(ids), ids, context.options.threads))
    about = About(
        model=keep.model,
        weights=keep.weights,
        vocabulary=found.vocabulary,
        stretches=tuple(stretches),
        texts=tuple(Encoded(text=text, ids=tuple(truth.encode_plain(text))) for text in NASTY),
        conversations=tuple(
            Rendered(messages=tuple(map(dict, messages)), text=truth.render(messages, prompt=True))
            for messages in (CONVERSATIONS if truth.chats else ())
        ),
        coarse=found.coarse / found.positions,
        full=found.full / found.positions,
    )
    return Golden(about, tuple(parts))


def _continuations(context: Context) -> Iterator[tuple[int, list[int]]]:
    """(tokens of the prompt, prompt and the teacher's greedy continuation) of each greedy prompt.

    The artifact drafts and the teacher reads: up to the first token that it would not have taken, the draft is its own
    continuation. A few passes through the teacher thus give many tokens.
    """
    count = context.options.greedy_tokens
    texts = [(len(prompt), prompt) for prompt in context.greedy_prompts()]
    # the artifact draws it never, and reads it only where a medium is
    never = token_of(context)
    for _ in range(MOST_PASSES):
        open_texts = [(prompt, ids) for prompt, ids in texts if len(ids) < prompt + count]
        if not open_texts:
            break
        drafts = [[*ids, *_draft(context, ids, prompt + count - len(ids))] for prompt, ids in open_texts]
        context.teacher.prepare(drafts)
        longer = {
            tuple(ids): agreed(preferred(context.teacher.logits(draft), never), draft, len(ids))
            for (_, ids), draft in zip(open_texts, drafts, strict=True)
        }
        texts = [(prompt, longer.get(tuple(ids), ids)[: prompt + count]) for prompt, ids in texts]
    yield from texts


def _draft(context: Context, ids: Sequence[int], count: int) -> list[int]:
    if context.slice_layers is not None:
        # the engine would load all of an artifact that is larger than the memory: the teacher adds a token in a pass
        return []
    return list(context.engine.generate(ids, max_new_tokens=count, stop_on_eos=False))


def preferred(logits: Logits, never: int | None) -> list[int]:
    """The likeliest token after each of a text's, but for ``never``; logits are [tokens, vocabulary]."""
    found = logits.argmax(-1)
    for place in np.flatnonzero(found == never):
        found[place] = np.where(np.arange(logits.shape[-1]) == never, -np.inf, logits[place]).argmax()
    return [int(token) for token in found]


def agreed(liked: Sequence[int], draft: Sequence[int], begin: int) -> list[int]:
    """The draft up to where the teacher prefers another token, and that token.

    Args:
        liked: the teacher's first choice after each token of ``draft``.
        begin: tokens of the draft that are settled.
    """
    place = begin
    while place < len(draft) and liked[place - 1] == draft[place]:
        place += 1
    return [*draft[:place], liked[place - 1]]
