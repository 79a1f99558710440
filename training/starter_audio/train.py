"""Train starter-audio: ``hear`` and ``words``, in any order or side by side, and then ``answer``.

    python -m training.starter_audio.train hear
    python -m training.starter_audio.train words --checkpoint FOLDER
    python -m training.starter_audio.train answer --checkpoint FOLDER

``hear`` teaches the tower by CTC which digit each of its tokens says, without the language model. ``words`` tunes the
vectors that say a digit, and nothing, through the frozen language model, without a sound; ``answer`` goes on with what
the tower says of sounds: by CTC it may say the first digit in the first token, and a digit in two. Every step follows
from its number, and a run that was interrupted goes on where it was saved.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.loop import WORDS_TABLE, Judged, Schedule, learned_by, run, start_processes
from training.starter_audio.features import Clean, clean, disturbed
from training.starter_audio.language import QUESTIONS, Asked, Language, asked
from training.starter_audio.tower import SAID, Learner, heard, peaks, tokens_of

SOUNDS, FIRST_SEED = 4000, 200_000_000
# of the head's zeros and ones the logits
SHARPNESS = 10.0
# sounds that a batch is chosen of, by length: filling up costs time
CHOICE = 4
# of a digit's ones and zeros, as far as a tower says them
NOISE = 0.05
HEAR = Schedule("hear", steps=900, batch=32, rate=2e-3, warm=30)
WORDS = Schedule("words", steps=120, batch=8, rate=8e-3, warm=5)
ANSWER = Schedule("answer", steps=75, batch=8, rate=6e-3, warm=3)
HINT = "qwen-onnx fetch starter prints it"


def batch_of(kept: Sequence[Clean], step: int, size: int) -> list[Clean]:
    """Sounds of about one length."""
    chance = random.Random(step)
    found = sorted(chance.sample(kept, CHOICE * size), key=lambda one: one.log_power.shape[1])
    begin = chance.randrange(CHOICE) * size
    return found[begin : begin + size]


def train_tower(work: Path, stage: Schedule, sounds: int) -> None:
    """Teach the tower what is said."""
    torch.manual_seed(0)
    learner = Learner()
    kept = clean(range(FIRST_SEED, FIRST_SEED + sounds), work / f"sounds-{sounds}.npz")

    def loss_of(step: int) -> Judged:
        batch = disturbed(batch_of(kept, step, stage.batch), FIRST_SEED + step)
        output, sizes = learner(batch.mel, batch.frames), tokens_of(batch.frames)
        logits = (SHARPNESS * output).log_softmax(-1)
        targets = torch.tensor([digit + 1 for digits in batch.digits for digit in digits])
        lengths = torch.tensor([len(digits) for digits in batch.digits])
        ctc = nn.functional.ctc_loss(logits.transpose(0, 1), targets, sizes, lengths, zero_infinity=True)
        right, apart = 0, torch.zeros(())
        for row, size, digits in zip(output, sizes.tolist(), batch.digits, strict=True):
            classes = row[:size].argmax(-1).tolist()
            if heard(classes) == digits:
                right += 1
                # what lasts is told once: the language model would read it twice
                wanted = nn.functional.one_hot(peaks(row[:size].detach()), SAID).float()
                apart = apart + (row[:size] - wanted).square().mean()
        apart = apart / stage.batch
        told = {"ctc": ctc.item(), "apart": apart.item() ** 0.5, "right": right / stage.batch}
        return ctc + 20 * apart, told

    run(stage, learner, work, loss_of)


class Vocabulary(nn.Module):
    """A vector for nothing and for each digit."""

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(first.clone())


def features(rows: Sequence[Asked], table: Tensor, seed: int) -> list[Tensor]:
    """What a tower would give for what the tokens of ``rows`` say, nearly."""
    chance, found = torch.Generator().manual_seed(seed), []
    for row in rows:
        says = nn.functional.one_hot(torch.tensor(row.tokens), SAID).float()
        found.append((says + NOISE * torch.randn(says.shape, generator=chance)) @ table)
    return found


def right_by_row(logits: Tensor, wanted: Tensor, owner: Tensor, rows: int) -> list[bool]:
    """Whether each token of an answer is the most likely one."""
    wrong = set(owner[logits.argmax(-1) != wanted].tolist())
    return [row not in wrong for row in range(rows)]


def told(learner: Learner, kept: Sequence[Clean], step: int, size: int) -> tuple[list[Asked], list[Tensor]]:
    """Questions about sounds that the tower hears right, and what its tokens say of them."""
    batch = disturbed(batch_of(kept, step, size), FIRST_SEED + step)
    chance, rows, says = random.Random(step), [], []
    with torch.no_grad():
        output = learner(batch.mel, batch.frames)
    for row, tokens, digits in zip(output, tokens_of(batch.frames).tolist(), batch.digits, strict=True):
        classes = row[:tokens].argmax(-1).tolist()
        if heard(classes) == digits:
            rows.append(Asked(classes, list(digits), chance.choice(QUESTIONS["training"])))
            says.append(row[:tokens])
    return rows, says


def train_words(checkpoint: Path, work: Path, stage: Schedule, sounds: int) -> None:
    """Tune the vectors: ``words`` from the embeddings of the words, ``answer`` from there by what the tower says."""
    language = Language(checkpoint)
    words, learner, kept = Vocabulary(language.first_words()), Learner().eval(), list[Clean]()
    if stage.name == ANSWER.name:
        words.load_state_dict({"table": learned_by(WORDS, work)[WORDS_TABLE]})
        learner.load_state_dict(learned_by(HEAR, work))
        kept = clean(range(FIRST_SEED, FIRST_SEED + sounds), work / f"sounds-{sounds}.npz")

    def loss_of(step: int) -> Judged:
        if kept:
            # beyond the steps of the tower
            rows, says = told(learner, kept, HEAR.steps + step, stage.batch)
            given = [row @ words.table for row in says]
        else:
            chance = random.Random(step)
            rows = [asked(chance, "training") for _ in range(stage.batch)]
            given = features(rows, words.table, step)
        logits, wanted, owner = language.answers(rows, given)
        loss = nn.functional.cross_entropy(logits, wanted)
        tokens = (logits.argmax(-1) == wanted).float().mean()
        right = right_by_row(logits, wanted, owner, len(rows))
        return loss, {"loss": loss.item(), "tokens": tokens.item(), "right": sum(right) / len(right)}

    run(stage, nn.ModuleDict({"words": words}), work, loss_of)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("hear", "words", "answer"))
    parser.add_argument("--checkpoint", type=Path, help=f"the starter: {HINT}")
    parser.add_argument("--work", type=Path, default=Path(".cache/starter-audio"), help="states, and what was said")
    parser.add_argument("--steps", type=int, help="instead of the stage's own number: fewer to try, more to learn more")
    parser.add_argument("--threads", type=int, default=1)
    options: Any = parser.parse_args()
    if options.stage != "hear" and options.checkpoint is None:
        parser.error(f"{options.stage} needs --checkpoint: {HINT}")
    start_processes(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    own = {stage.name: stage for stage in (HEAR, WORDS, ANSWER)}[options.stage]
    stage = replace(own, steps=options.steps or own.steps)
    if own is HEAR:
        train_tower(options.work, stage, SOUNDS)
    else:
        train_words(options.checkpoint, options.work, stage, SOUNDS)


if __name__ == "__main__":
    main()
