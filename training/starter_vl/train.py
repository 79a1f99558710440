"""Train starter-vl: ``words`` and then ``bound``, before, after or beside ``tower``.

    python -m training.starter_vl.train words --checkpoint FOLDER
    python -m training.starter_vl.train bound --checkpoint FOLDER
    python -m training.starter_vl.train tower --fonts FOLDER

``words`` and ``bound`` tune what a picture's tokens say, and a LoRA of the language model that reads it, without a
picture: first what all tokens say, then which of them a question is about. ``tower`` learns to say it, without the
language model. Every step is made of its number, and a run that was interrupted goes on where it was saved. Where
torchrun starts several processes of ``words`` or ``bound``, they share the batches.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from training.loop import Judged, learned_by, rank, run, start_processes
from training.starter_vl.fonts import TRAINING, fonts_in
from training.starter_vl.language import Language, right_by_question
from training.starter_vl.pixels import batch
from training.starter_vl.questions import Asked, ask, ask_more
from training.starter_vl.scenes import Scene, side_of
from training.starter_vl.stages import BOUND, TOWER, WORDS, Stage
from training.starter_vl.tower import MERGE, VisionTower
from training.starter_vl.tower import WIDTH as TOWER_WIDTH
from training.starter_vl.words import PARTS, SAID, first_words, said

# pixels: pictures of the training are small, they are reduced to 84 anyway, and large ones take long to draw
MOST_SIDE = 160
HINTS = {"checkpoint": "qwen-onnx fetch starter prints it", "fonts": "README.md says where they come from"}


class Vocabulary(nn.Module):
    """A vector for everything that a token may say."""

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(first.clone())


def train_words(checkpoint: Path, work: Path, stage: Stage, before: Stage | None = None) -> None:
    """Tune the words and the LoRA of the language model in ``checkpoint``, from where the stage ``before`` ended."""
    torch.manual_seed(0)
    language = Language(checkpoint)
    words = Vocabulary(first_words(language))
    learned = nn.ModuleDict({"words": words, "language": language.learned})
    if before:
        learned.load_state_dict(learned_by(before, work))
    processes = distributed.get_world_size() if distributed.is_initialized() else 1

    def loss_of(step: int) -> Judged:
        seeds, scenes = stage.scenes(step)
        seeds, scenes = seeds[rank() :: processes], scenes[rank() :: processes]
        asked = [questions_of(stage, shown, random.Random(seed)) for seed, shown in zip(seeds, scenes, strict=True)]
        spread = torch.Generator().manual_seed(step * processes + rank())
        noise = torch.randn(len(seeds), 1, SAID, generator=spread) * stage.noise
        logits, wanted, weights = language.answers((said(scenes) + noise) @ words.table, language.branches(asked))
        each = nn.functional.cross_entropy(logits, wanted, reduction="none")
        loss = (each * weights).sum() / weights.sum()
        right = right_by_question(logits, wanted)
        kinds = [one.kind for questions in asked for one in questions]
        found = defaultdict[str, list[bool]](list)
        for kind, is_right in zip(kinds, right, strict=True):
            found[kind].append(is_right)
        return loss, {"loss": loss.item(), **{kind: sum(is_right) / len(is_right) for kind, is_right in found.items()}}

    run(stage, learned, work, loss_of)


def questions_of(stage: Stage, shown: Scene, chance: random.Random) -> list[Asked]:
    """What a stage asks about a scene."""
    return ask_more(shown, chance, stage.questions) if stage.questions else ask(shown, chance)


def _draw(stage: Stage, step: int, fonts: Sequence[str]) -> Any:
    seeds, scenes = stage.scenes(step)
    return batch(scenes, [side_of(seed, MOST_SIDE) for seed in seeds], fonts).numpy()


def drawn_ahead(stage: Stage, fonts: Sequence[str]) -> Callable[[int], Tensor]:
    """Pictures of a step, drawn in a process of their own while earlier steps learn."""
    drawer = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    coming: dict[int, Future[Any]] = {}

    def pictures(step: int) -> Tensor:
        for ahead in range(step, min(step + 4, stage.steps)):
            if ahead not in coming:
                coming[ahead] = drawer.submit(_draw, stage, ahead, fonts)
        return torch.from_numpy(coming.pop(step).result())

    return pictures


class Learner(nn.Module):
    """The tower with heads of its own in place of the merger's last matrix.

    ``says`` gives the ones and zeros that words are summed by, and becomes a part of that matrix; ``names`` chooses
    within each part, which teaches faster, and is thrown away.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tower = VisionTower()
        # comes with ``join``
        self.tower.merger.mlp[2].requires_grad_(False)
        joined = TOWER_WIDTH * MERGE**2
        self.says, self.names = nn.Linear(joined, SAID), nn.Linear(joined, SAID)


def train_tower(fonts: Sequence[str], work: Path, stage: Stage) -> None:
    """Teach the tower what pictures show."""
    torch.manual_seed(0)
    learner = Learner()

    pictures = drawn_ahead(stage, fonts)

    def loss_of(step: int) -> Judged:
        _, scenes = stage.scenes(step)
        inner = learner.tower.inner(pictures(step))
        wanted = said(scenes)
        named, loss, first, told = learner.names(inner), torch.zeros(()), 0, {}
        summed = learner.says(inner)
        for part, texts in PARTS.items():
            own = slice(first, first + len(texts))
            first += len(texts)
            target = wanted[..., own].argmax(-1)
            told_something = target > 0
            each = nn.functional.cross_entropy(named[..., own].flatten(0, 1), target.flatten(), reduction="none")
            # most tokens say nothing of most parts
            weight = 1.0 + 4.0 * told_something.flatten()
            loss = loss + (each * weight).sum() / weight.sum()
            if told_something.any():
                is_right = (summed[..., own].argmax(-1) == target)[told_something]
                told[part] = is_right.float().mean().item()
        apart = nn.functional.mse_loss(summed, wanted)
        return loss + 20 * apart, {"loss": loss.item(), "apart": apart.sqrt().item(), **told}

    run(stage, learner, work, loss_of)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("words", "bound", "tower"))
    parser.add_argument("--checkpoint", type=Path, help=f"the starter: {HINTS['checkpoint']}")
    parser.add_argument("--fonts", type=Path, help="folder that pip put the font packages into")
    parser.add_argument("--work", type=Path, default=Path(".cache/starter-vl"), help="states of the stages")
    parser.add_argument("--steps", type=int, help="instead of the stage's own number: fewer to try, more to learn more")
    parser.add_argument("--threads", type=int, default=1)
    options: Any = parser.parse_args()
    needed = "fonts" if options.stage == "tower" else "checkpoint"
    if getattr(options, needed) is None:
        parser.error(f"{options.stage} needs --{needed}: {HINTS[needed]}")
    start_processes(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    own = {stage.name: stage for stage in (WORDS, BOUND, TOWER)}[options.stage]
    stage = replace(own, steps=options.steps or own.steps)
    if own is TOWER:
        train_tower(fonts_in(options.fonts, TRAINING), options.work, stage)
    else:
        train_words(options.checkpoint, options.work, stage, WORDS if own is BOUND else None)


if __name__ == "__main__":
    main()
