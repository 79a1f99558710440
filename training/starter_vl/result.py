"""What training made of starter-vl: ask it, and write its file.

    python -m training.starter_vl.result try --checkpoint FOLDER --fonts FOLDER
    python -m training.starter_vl.result join --checkpoint FOLDER --output starter-vl.safetensors

``try`` asks tower and language model about unseen pictures, in PyTorch. ``join`` multiplies what the tower says and the
words into the merger's last matrix, and writes the file that the recipe names.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.loop import WORDS_TABLE, learned_by
from training.starter_vl.fonts import TRAINING, fonts_in
from training.starter_vl.language import Language, right_by_question
from training.starter_vl.pixels import batch
from training.starter_vl.questions import ask
from training.starter_vl.scenes import scene, side_of
from training.starter_vl.stages import BOUND, SEEDS, TOWER
from training.starter_vl.tower import OUTPUT, VisionTower
from training.starter_vl.towerfile import write_tower
from training.starter_vl.train import HINTS, Learner, Vocabulary
from training.starter_vl.words import SAID

# of the LoRA: less of it disturbs plain text less, and half of it reads pictures badly
STRENGTH = 0.85
# pictures
TRIED = 100


def joined(work: Path) -> VisionTower:
    """The tower whose merger says the words."""
    learner, words = Learner(), Vocabulary(torch.zeros(SAID, OUTPUT))
    learner.load_state_dict(learned_by(TOWER, work))
    words.load_state_dict({"table": learned_by(BOUND, work)[WORDS_TABLE]})
    tower, last = learner.tower, learner.tower.merger.mlp[2]
    assert isinstance(last, nn.Linear), "the merger ends in a matrix"
    with torch.no_grad():
        last.weight.copy_(words.table.T @ learner.says.weight)
        last.bias.copy_(learner.says.bias @ words.table)
    return tower


def taught(checkpoint: Path, work: Path) -> Language:
    """The language model with what ``words`` and ``bound`` taught it, at STRENGTH."""
    language, prefix = Language(checkpoint), "language."
    state = {name: value for name, value in learned_by(BOUND, work).items() if name.startswith(prefix)}
    language.learned.load_state_dict({name.removeprefix(prefix): value for name, value in state.items()})
    with torch.no_grad():
        for name, value in language.learned.named_parameters():
            value.mul_(STRENGTH if name.endswith(".b") else 1.0)
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
    parser.add_argument("step", choices=("try", "join"))
    parser.add_argument("--checkpoint", type=Path, required=True, help=f"the starter: {HINTS['checkpoint']}")
    parser.add_argument("--fonts", type=Path, help="folder that pip put the font packages into")
    parser.add_argument("--work", type=Path, default=Path(".cache/starter-vl"), help="states of the stages")
    parser.add_argument("--output", type=Path, default=Path("starter-vl.safetensors"))
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any]
    if options.step == "try":
        if options.fonts is None:
            parser.error(f"try needs --fonts: {HINTS['fonts']}")
        found = try_out(options.checkpoint, fonts_in(options.fonts, TRAINING), options.work, TRIED)
    else:
        learned = taught(options.checkpoint, options.work).learned
        found = write_tower(joined(options.work), learned, options.output)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
