"""Train the tower of starter-vl: ``words``, then or meanwhile ``tower``, then ``join``.

    python -m training.starter_vl.train words --checkpoint FOLDER
    python -m training.starter_vl.train tower --fonts FOLDER
    python -m training.starter_vl.train join --output starter-vl.safetensors

``words`` tunes what a picture's tokens say through the frozen language model, without a picture. ``tower`` learns to
say it, without the language model. ``join`` multiplies both into the merger's last matrix. Every step is made of its
number and the seed, and a run that was interrupted goes on where it was saved.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.starter_vl.fonts import TRAINING, fonts_in
from training.starter_vl.language import Language, right_by_question
from training.starter_vl.pixels import batch
from training.starter_vl.questions import ask
from training.starter_vl.scenes import Scene, scene, side_of
from training.starter_vl.tower import MERGE, OUTPUT, VisionTower
from training.starter_vl.tower import WIDTH as TOWER_WIDTH
from training.starter_vl.towerfile import write_tower
from training.starter_vl.words import PARTS, SAID, first_words, said

SEEDS = {"words": 100_000_000, "tower": 200_000_000}
# pictures of the training are small: they are reduced to 84 pixels anyway, and large ones take long to draw
MOST_SIDE = 200
SAVED_EVERY = 20


@dataclass(frozen=True)
class Stage:
    """How long and how fast a stage learns; ``noise`` is the deviation of what the tower will say from the truth."""

    name: str
    steps: int
    batch: int
    rate: float
    warm: int
    noise: float = 0.0

    def rate_at(self, step: int) -> float:
        """Rises, stays, and falls in the second half."""
        return self.rate * min(1.0, (step + 1) / self.warm, max(0.02, 2 * (1 - step / self.steps)))

    def scenes(self, step: int) -> tuple[list[int], list[Scene]]:
        """Seeds and scenes of a step."""
        first = SEEDS[self.name] + step * self.batch
        seeds = list(range(first, first + self.batch))
        return seeds, [scene(seed) for seed in seeds]


# as many steps as two quiet cores make in an hour
WORDS = Stage("words", steps=1000, batch=2, rate=0.015, warm=5, noise=0.08)
TOWER = Stage("tower", steps=4000, batch=32, rate=1.2e-3, warm=50)


# of a step: the loss, and what to show of it
Judged = tuple[Tensor, dict[str, float]]


def run(stage: Stage, learned: nn.Module, work: Path, loss_of: Callable[[int], Judged]) -> None:
    """All steps of a stage; ``loss_of`` a step gives the loss and what to show of it."""
    file = work / f"{stage.name}.pt"
    parameters = list(learned.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=stage.rate, betas=(0.9, 0.97), weight_decay=0.0)
    first, shown, begun = 0, defaultdict[str, float](float), time.monotonic()
    if file.exists():
        state = torch.load(file, weights_only=True)
        first = state["step"]
        learned.load_state_dict(state["learned"])
        optimiser.load_state_dict(state["optimiser"])
    for step in range(first, stage.steps):
        for group in optimiser.param_groups:
            group["lr"] = stage.rate_at(step)
        loss, told = loss_of(step)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        for name, value in told.items():
            shown[name] = 0.9 * shown[name] + 0.1 * value if name in shown else value
        done = step + 1
        if done % SAVED_EVERY == 0 or done == stage.steps:
            state = {"step": done, "learned": learned.state_dict(), "optimiser": optimiser.state_dict()}
            torch.save(state, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
        if done % 5 == 0 or done == stage.steps:
            left = (time.monotonic() - begun) / (done - first) * (stage.steps - done)
            figures = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
            print(f"{stage.name} {done}/{stage.steps}  {left / 60:.0f} min left  {figures}", flush=True)


class Vocabulary(nn.Module):
    """A vector for everything that a token may say."""

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(first.clone())


def train_words(checkpoint: Path, work: Path, stage: Stage) -> None:
    """Tune the words through the language model in ``checkpoint``."""
    language = Language(checkpoint)
    words = Vocabulary(first_words(language))

    def loss_of(step: int) -> Judged:
        seeds, scenes = stage.scenes(step)
        asked = [ask(shown, random.Random(seed)) for seed, shown in zip(seeds, scenes, strict=True)]
        noise = torch.randn(stage.batch, 1, SAID, generator=torch.Generator().manual_seed(step)) * stage.noise
        logits, wanted = language.answers((said(scenes) + noise) @ words.table, language.branches(asked))
        loss = nn.functional.cross_entropy(logits, wanted)
        right = right_by_question(logits, wanted)
        kinds = [one.kind for questions in asked for one in questions]
        found = defaultdict[str, list[bool]](list)
        for kind, is_right in zip(kinds, right, strict=True):
            found[kind].append(is_right)
        return loss, {"loss": loss.item(), **{kind: sum(is_right) / len(is_right) for kind, is_right in found.items()}}

    run(stage, words, work, loss_of)


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

    def loss_of(step: int) -> Judged:
        seeds, scenes = stage.scenes(step)
        inner = learner.tower.inner(batch(scenes, [side_of(seed, MOST_SIDE) for seed in seeds], fonts))
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


def joined(work: Path) -> VisionTower:
    """The tower whose merger says the words."""
    learner, words = Learner(), Vocabulary(torch.zeros(SAID, OUTPUT))
    learner.load_state_dict(torch.load(work / "tower.pt", weights_only=True)["learned"])
    words.load_state_dict(torch.load(work / "words.pt", weights_only=True)["learned"])
    tower, last = learner.tower, learner.tower.merger.mlp[2]
    assert isinstance(last, nn.Linear), "the merger ends in a matrix"
    with torch.no_grad():
        last.weight.copy_(words.table.T @ learner.says.weight)
        last.bias.copy_(learner.says.bias @ words.table)
    return tower


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("words", "tower", "join"))
    parser.add_argument("--checkpoint", type=Path, help="the starter: qwen-onnx fetch starter")
    parser.add_argument("--fonts", type=Path, help="folder that pip put the font packages into")
    parser.add_argument("--work", type=Path, default=Path(".cache/starter-vl"), help="states of both stages")
    parser.add_argument("--output", type=Path, default=Path("starter-vl.safetensors"))
    parser.add_argument("--steps", type=int, help="instead of the stage's own number: fewer to try, more to learn more")
    parser.add_argument("--threads", type=int, default=2)
    options: Any = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.stage == "words":
        if options.checkpoint is None:
            parser.error("words needs --checkpoint: qwen-onnx fetch starter prints it")
        train_words(options.checkpoint, options.work, replace(WORDS, steps=options.steps or WORDS.steps))
    elif options.stage == "tower":
        if options.fonts is None:
            parser.error("tower needs --fonts")
        fonts = fonts_in(options.fonts, TRAINING)
        train_tower(fonts, options.work, replace(TOWER, steps=options.steps or TOWER.steps))
    else:
        print(json.dumps(write_tower(joined(options.work), options.output)))


if __name__ == "__main__":
    main()
