"""Train the tower of starter-vl: ``words``, then or meanwhile ``tower``, then ``try`` and ``join``.

    python -m training.starter_vl.train words --checkpoint FOLDER
    python -m training.starter_vl.train tower --fonts FOLDER
    python -m training.starter_vl.train try --checkpoint FOLDER --fonts FOLDER
    python -m training.starter_vl.train join --checkpoint FOLDER --output starter-vl.safetensors

``words`` tunes what a picture's tokens say, and a LoRA of the language model that reads it, without a picture.
``tower`` learns to say it, without the language model. ``try`` asks both about unseen pictures, in PyTorch. ``join``
multiplies both into the merger's last matrix and writes the file. Every step is made of its number, and a run that was
interrupted goes on where it was saved.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from training.starter_vl.fonts import TRAINING, fonts_in
from training.starter_vl.language import Language, right_by_question
from training.starter_vl.pixels import batch
from training.starter_vl.questions import Asked, ask, ask_more
from training.starter_vl.scenes import Scene, scene, side_of
from training.starter_vl.tower import MERGE, OUTPUT, VisionTower
from training.starter_vl.tower import WIDTH as TOWER_WIDTH
from training.starter_vl.towerfile import write_tower
from training.starter_vl.words import PARTS, SAID, first_words, said

SEEDS = {"words": 100_000_000, "bound": 150_000_000, "tower": 200_000_000, "try": 300_000_000}
# pictures
TRIED = 100
# pictures of the training are small: they are reduced to 84 pixels anyway, and large ones take long to draw
MOST_SIDE = 160
SAVED_EVERY = 10
# digits take many more pictures to learn than shapes do
DIGITS_DRAWN = 0.6


@dataclass(frozen=True)
class Stage:
    """How long and how fast a stage learns.

    Attributes:
        noise: deviation of what the tower will say from the truth.
        digits, alone: see ``scene``.
        questions: the most about a picture; 0: one of each kind.
    """

    name: str
    steps: int
    batch: int
    rate: float
    warm: int
    noise: float = 0.0
    digits: float = 0.25
    alone: float = 0.25
    questions: int = 0

    def rate_at(self, step: int) -> float:
        """Rises, stays, and falls in the second half."""
        return self.rate * min(1.0, (step + 1) / self.warm, max(0.02, 2 * (1 - step / self.steps)))

    def scenes(self, step: int) -> tuple[list[int], list[Scene]]:
        """Seeds and scenes of a step."""
        first = SEEDS[self.name] + step * self.batch
        seeds = list(range(first, first + self.batch))
        return seeds, [scene(seed, self.digits, self.alone) for seed in seeds]


# as many steps as two quiet cores make in an hour
WORDS = Stage("words", steps=160, batch=6, rate=2e-3, warm=5, noise=0.1)
# what all tokens say is learned by then; now which of them is asked about
BOUND = Stage("bound", steps=240, batch=8, rate=1e-3, warm=5, noise=0.05, digits=0.15, alone=0.1, questions=5)
TOWER = Stage("tower", steps=1500, batch=64, rate=2e-3, warm=50, digits=DIGITS_DRAWN)


# of a step: the loss, and what to show of it
Judged = tuple[Tensor, dict[str, float]]


def run(stage: Stage, learned: nn.Module, work: Path, loss_of: Callable[[int], Judged]) -> None:
    """All steps of a stage; ``loss_of`` a step gives the loss and what to show of it."""
    file = work / f"{stage.name}.pt"
    parameters = list(learned.parameters())
    optimisers = optimisers_of(learned, stage.rate)
    first, shown, begun = 0, defaultdict[str, float](float), time.monotonic()
    if file.exists():
        state = torch.load(file, weights_only=True)
        first = state["step"]
        learned.load_state_dict(state["learned"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
    for step in range(first, stage.steps):
        loss, told = loss_of(step)
        learned.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        _mean_of_all(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = stage.rate_at(step)
            optimiser.step()
        for name, value in told.items():
            shown[name] = 0.9 * shown[name] + 0.1 * value if name in shown else value
        done = step + 1
        if rank() == 0 and (done % SAVED_EVERY == 0 or done == stage.steps):
            saved = [optimiser.state_dict() for optimiser in optimisers]
            state = {"step": done, "learned": learned.state_dict(), "optimisers": saved}
            torch.save(state, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
        if rank() == 0 and (done % 5 == 0 or done == stage.steps):
            left = (time.monotonic() - begun) / (done - first) * (stage.steps - done)
            figures = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
            print(f"{stage.name} {done}/{stage.steps}  {left / 60:.0f} min left  {figures}", flush=True)


def rank() -> int:
    """Which of the processes this is, of those that share a stage's batches."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def _mean_of_all(parameters: Sequence[nn.Parameter]) -> None:
    """Gradients become the mean of those of all processes."""
    if distributed.is_initialized():
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(together)
        together /= distributed.get_world_size()
        first = 0
        for gradient in gradients:
            gradient.copy_(together[first : first + gradient.numel()].view_as(gradient))
            first += gradient.numel()


def optimisers_of(learned: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside a tower, AdamW for everything else."""
    hidden = {name for name, _ in learned.named_parameters() if ".blocks." in name and name.endswith("weight")}
    found = dict(learned.named_parameters())
    matrices = [found[name] for name in sorted(hidden) if found[name].ndim == 2]
    others = [value for name, value in found.items() if name not in hidden or value.ndim != 2]
    answer: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.97), weight_decay=0.0)]
    if matrices:
        answer.append(torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return answer


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


def joined(work: Path) -> VisionTower:
    """The tower whose merger says the words."""
    learner, words = Learner(), Vocabulary(torch.zeros(SAID, OUTPUT))
    learner.load_state_dict(learned_by(TOWER, work))
    words.load_state_dict({"table": learned_by(BOUND, work)["words.table"]})
    tower, last = learner.tower, learner.tower.merger.mlp[2]
    assert isinstance(last, nn.Linear), "the merger ends in a matrix"
    with torch.no_grad():
        last.weight.copy_(words.table.T @ learner.says.weight)
        last.bias.copy_(learner.says.bias @ words.table)
    return tower


def learned_by(stage: Stage, work: Path) -> dict[str, Tensor]:
    """What a stage has learned up to now."""
    found: dict[str, Tensor] = torch.load(work / f"{stage.name}.pt", weights_only=True)["learned"]
    return found


def taught(checkpoint: Path, work: Path) -> Language:
    """The language model with what ``words`` taught it."""
    language, prefix = Language(checkpoint), "language."
    state = {name: value for name, value in learned_by(BOUND, work).items() if name.startswith(prefix)}
    language.learned.load_state_dict({name.removeprefix(prefix): value for name, value in state.items()})
    return language


@torch.no_grad()
def try_out(checkpoint: Path, fonts: Sequence[str], work: Path, pictures: int) -> dict[str, str]:
    """Right answers by kind about unseen pictures, worded as in the exam, fonts those of the training."""
    language, tower, found = taught(checkpoint, work), joined(work), defaultdict[str, list[bool]](list)
    first, size = SEEDS["try"], 10
    for begin in range(first, first + pictures, size):
        seeds = range(begin, begin + size)
        scenes = [scene(seed) for seed in seeds]
        asked = [ask(shown, random.Random(seed), exam=True) for seed, shown in zip(seeds, scenes, strict=True)]
        features = tower(batch(scenes, [side_of(seed) for seed in seeds], fonts))
        logits, wanted, _ = language.answers(features, language.branches(asked))
        kinds = [one.kind for questions in asked for one in questions]
        for kind, is_right in zip(kinds, right_by_question(logits, wanted), strict=True):
            found[kind].append(is_right)
    return {kind: f"{sum(is_right)}/{len(is_right)}" for kind, is_right in sorted(found.items())}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("words", "bound", "tower", "try", "join"))
    parser.add_argument("--checkpoint", type=Path, help="the starter: qwen-onnx fetch starter")
    parser.add_argument("--fonts", type=Path, help="folder that pip put the font packages into")
    parser.add_argument("--work", type=Path, default=Path(".cache/starter-vl"), help="states of both stages")
    parser.add_argument("--output", type=Path, default=Path("starter-vl.safetensors"))
    parser.add_argument("--steps", type=int, help="instead of the stage's own number: fewer to try, more to learn more")
    parser.add_argument("--threads", type=int, default=1)
    options: Any = parser.parse_args()
    torch.set_num_threads(options.threads)
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("gloo")
    options.work.mkdir(parents=True, exist_ok=True)
    needed = {"tower": ("fonts",), "try": ("checkpoint", "fonts")}
    hints = {"checkpoint": "qwen-onnx fetch starter prints it", "fonts": "README.md says where they come from"}
    for name in needed.get(options.stage, ("checkpoint",)):
        if getattr(options, name) is None:
            parser.error(f"{options.stage} needs --{name}: {hints[name]}")
    fonts = fonts_in(options.fonts, TRAINING) if options.fonts else []
    if options.stage == "words":
        train_words(options.checkpoint, options.work, replace(WORDS, steps=options.steps or WORDS.steps))
    elif options.stage == "bound":
        train_words(options.checkpoint, options.work, replace(BOUND, steps=options.steps or BOUND.steps), WORDS)
    elif options.stage == "tower":
        train_tower(fonts, options.work, replace(TOWER, steps=options.steps or TOWER.steps))
    elif options.stage == "try":
        print(json.dumps(try_out(options.checkpoint, fonts, options.work, TRIED)))
    else:
        learned = taught(options.checkpoint, options.work).learned
        print(json.dumps(write_tower(joined(options.work), learned, options.output)))


if __name__ == "__main__":
    main()
