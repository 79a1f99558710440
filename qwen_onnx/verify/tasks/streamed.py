"""Benchmarks by a checkpoint that PyTorch does not fit in: all items go through a layer before the next is read.

Answers are drafted by the artifact: up to the first token that PyTorch would not have taken, a draft is its own greedy
answer (Leviathan et al. 2023, arXiv:2211.17192). A few passes through the checkpoint thus give whole answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from qwen_onnx.processes.progress import progress
from qwen_onnx.runtime.engines.genai import Shape
from qwen_onnx.verify.context import Context
from qwen_onnx.verify.keeping import agreed
from qwen_onnx.verify.tasks.models import Wanted, said, scored

# bytes of hidden states that wait in files between two layers
SCRATCH = 1 << 30


class Streamed:
    """PyTorch fp32, one decoder layer in memory at a time."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._ends = Shape.read(context.artifact).eos_token_ids

    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """See ``models.Score``."""
        teacher, found = self._context.teacher, []
        texts = [[*prompt, *continuation[:-1]] for prompt, continuation in pairs]
        for piece in self._pieces(texts):
            progress(f"tasks: PyTorch reads {piece.stop} of {len(texts)} texts")
            teacher.prepare(texts[piece])
            for text, (prompt, continuation) in zip(texts[piece], pairs[piece], strict=True):
                found.append(scored(teacher.logits(text)[len(prompt) - 1 :], continuation))
            teacher.forget()
        return found

    def generate(self, asked: Sequence[Wanted]) -> list[str]:
        """See ``models.Generate``."""
        context = self._context
        answers = [list(wanted.prompt) for wanted in asked]
        open_ = list(range(len(asked)))
        while open_:
            progress(f"tasks: PyTorch reads drafts, {len(open_)} of {len(asked)} answers are open")
            drafts = [self._draft(asked[place], answers[place]) for place in open_]
            # the engine drafted; it and the layers of PyTorch need not be in memory together
            context.unload()
            for piece in self._pieces(drafts):
                context.teacher.prepare(drafts[piece])
                for place, draft in zip(open_[piece], drafts[piece], strict=True):
                    preferred = context.teacher.logits(draft).argmax(-1).tolist()
                    answers[place] = agreed(preferred, draft, len(answers[place]))
                context.teacher.forget()
            open_ = [place for place in open_ if not self._ended(asked[place], answers[place])]
        return [self._text(wanted, ids) for wanted, ids in zip(asked, answers, strict=True)]

    def _draft(self, wanted: Wanted, ids: Sequence[int]) -> list[int]:
        """The settled ids and what the artifact would add: one token less than wanted, since PyTorch adds one."""
        count, draft = len(wanted.prompt) + wanted.most - len(ids) - 1, list(ids)

        def drafted() -> Iterator[int]:
            for token in self._context.engine.generate(ids, max_new_tokens=count):
                draft.append(token)
                yield token

        if count:
            said(chain(self._answer(wanted, ids), drafted()), wanted.stops, self._context.tokenizer)
        return draft

    def _answer(self, wanted: Wanted, ids: Sequence[int]) -> Iterator[int]:
        """The new tokens up to the end of text."""
        for token in ids[len(wanted.prompt) :][: wanted.most]:
            if token in self._ends:
                return
            yield token

    def _ended(self, wanted: Wanted, ids: Sequence[int]) -> bool:
        new = ids[len(wanted.prompt) :]
        done = len(new) >= wanted.most or any(token in self._ends for token in new)
        return done or said(self._answer(wanted, ids), wanted.stops, self._context.tokenizer).stopped

    def _text(self, wanted: Wanted, ids: Sequence[int]) -> str:
        return said(self._answer(wanted, ids), wanted.stops, self._context.tokenizer).text

    def _pieces(self, texts: Sequence[Sequence[int]]) -> Iterator[slice]:
        """Neighbouring texts whose hidden states fit into ``SCRATCH``."""
        most = SCRATCH // (8 * self._context.teacher.teacher.config.hidden_size)
        begin = tokens = 0
        for place, text in enumerate(texts):
            if tokens and tokens + len(text) > most:
                yield slice(begin, place)
                begin, tokens = place, 0
            tokens += len(text)
        if tokens:
            yield slice(begin, len(texts))
