"""What training made of starter-audio: ask it, and write its file.

    python -m training.starter_audio.result try --checkpoint FOLDER
    python -m training.starter_audio.result join --output starter-audio.safetensors

``try`` asks tower and language model about unseen sounds, in PyTorch. ``join`` multiplies what the tower says and the
vectors into the projector, and writes the file that the recipe names.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen_onnx.runtime.processing.audio import prepare_sound
from training.loop import WORDS_TABLE, learned_by
from training.starter_audio.exam import SPLITS, Item, items
from training.starter_audio.language import Asked, Language
from training.starter_audio.tower import OUTPUT, SAID, WIDTH, Learner, heard
from training.starter_audio.towerfile import write_tower
from training.starter_audio.train import ANSWER, HEAR, HINT, Vocabulary, right_by_row

# sounds of each split
TRIED = 100


def learner_of(work: Path) -> Learner:
    """The tower with its head."""
    learner = Learner().eval()
    learner.load_state_dict(learned_by(HEAR, work))
    return learner


def projector_of(learner: Learner, work: Path) -> nn.Linear:
    """What makes of the tower's output what the language model reads."""
    words = Vocabulary(torch.zeros(SAID, OUTPUT))
    words.load_state_dict({"table": learned_by(ANSWER, work)[WORDS_TABLE]})
    found = nn.Linear(WIDTH, OUTPUT)
    with torch.no_grad():
        found.weight.copy_(words.table.T @ learner.says.weight)
        found.bias.copy_(learner.says.bias @ words.table)
    return found


def inner(learner: Learner, item: Item) -> Tensor:
    """What the projector gets of a sound, [tokens, width]."""
    sound = prepare_sound(item.samples, item.settings)
    found: Tensor = learner.tower(torch.from_numpy(sound.mel)[None], torch.tensor([sound.frames]))[0, : sound.tokens]
    return found


@torch.no_grad()
def try_out(checkpoint: Path, work: Path, sounds: int) -> dict[str, str]:
    """Of each split, the sounds that the tower hears right, and those of which the answer is right to the letter."""
    learner, language, found = learner_of(work), Language(checkpoint), dict[str, str]()
    projector = projector_of(learner, work)
    for split in SPLITS:
        told, answered = 0, 0
        for item in items(sounds, split):
            state = inner(learner, item)
            told += heard(learner.says(state).argmax(-1).tolist()) == item.digits
            row = Asked([], list(item.digits), item.question)
            logits, wanted, owner = language.answers([row], [projector(state)])
            answered += sum(right_by_row(logits, wanted, owner, 1))
        found[split] = f"heard {told}/{sounds}, answered {answered}/{sounds}"
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("try", "join"))
    parser.add_argument("--checkpoint", type=Path, help=f"the starter: {HINT}")
    parser.add_argument("--work", type=Path, default=Path(".cache/starter-audio"), help="states of the stages")
    parser.add_argument("--output", type=Path, default=Path("starter-audio.safetensors"))
    parser.add_argument("--sounds", type=int, default=TRIED)
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any]
    if options.step == "try":
        if options.checkpoint is None:
            parser.error(f"try needs --checkpoint: {HINT}")
        found = dict(try_out(options.checkpoint, options.work, options.sounds))
    else:
        learner = learner_of(options.work)
        found = write_tower(learner.tower, projector_of(learner, options.work), options.output)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
