"""The starter's language model, frozen, and what it answers to features in the places of a picture's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.starter_vl.lora import Halved, adapt
from training.starter_vl.questions import Asked
from training.starter_vl.scenes import GRID

# ids of special tokens that the starter has and never uses; the batch engine tries itself out with the ids 1 to 9
VISION_START, IMAGE, VISION_END, VIDEO = 13, 14, 15, 16
END, TOKENS, WIDTH = 2, GRID**2, 576
# what a token of an answer's form counts in the loss; one of its fact counts 1
FORM = 0.1
# dimensions of the positions in time, down and across; half of a head
SECTIONS = [8, 12, 12]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
BEFORE = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
BEHIND = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Branches:
    """Pictures with several questions each, all in one row: a question sees its picture and itself.

    Attributes:
        ids: [1, tokens] behind the system's message; ``mask`` [1, 1, tokens, all] is added to scores.
        places: [3, 1, tokens] positions; ``targets`` the next token where it belongs to an answer, or -100.
        weights: [tokens] what the target counts in the loss.
    """

    ids: Tensor
    mask: Tensor
    places: Tensor
    targets: Tensor
    weights: Tensor


class Language:
    """Qwen2.5-VL's text model with the starter's weights, none of which changes."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoTokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, Qwen2ForCausalLM

        starter = Qwen2ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        told = starter.config.to_dict()
        for name in ("model_type", "architectures", "rope_parameters"):
            told.pop(name)
        rope = {**starter.config.rope_parameters, "mrope_section": SECTIONS}
        self.model = Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**told, rope_parameters=rope)).eval()
        self.model.load_state_dict(starter.model.state_dict())
        self.model.requires_grad_(False)
        self.learned = adapt(self.model.layers)
        self.table = self.model.embed_tokens.weight
        self._halved = self.table.to(torch.bfloat16)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        self._before = self._encode(BEFORE)

    def _encode(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return found

    def words(self, text: str) -> Tensor:
        """The mean embedding of a word's tokens."""
        found: Tensor = self.table[self._encode(f" {text}")].mean(0)
        return found

    def branches(self, asked: Sequence[Sequence[Asked]]) -> Branches:
        """Of several pictures with their questions."""
        rows, past = [self._row(questions) for questions in asked], len(self._before)
        before = [[place] * 3 for place in range(past)]
        ids = torch.tensor(self._before + [token for row in rows for token in row[0]])
        places = torch.tensor(before + [[past + axis for axis in place] for row in rows for place in row[1]]).T
        targets = torch.tensor([-100] * past + [target for row in rows for target in row[2]])
        weights = torch.tensor([0.0] * past + [weight for row in rows for weight in row[4]])
        # the system's message belongs to all pictures, and a picture to all of its questions
        picture = torch.tensor([-1] * past + [number for number, row in enumerate(rows) for _ in row[0]])
        owner = torch.tensor([0] * past + [one for row in rows for one in row[3]])
        own = (owner[:, None] == owner[None]) | (owner[None] == 0)
        seen = (own & ((picture[:, None] == picture[None]) | (picture[None] < 0))).tril()
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return Branches(ids[None], mask[None, None], places[:, None], targets[None], weights[None])

    def _row(self, questions: Sequence[Asked]) -> tuple[list[int], list[list[int]], list[int], list[int], list[float]]:
        ids = [VISION_START, *[IMAGE] * TOKENS, VISION_END]
        # a picture's positions begin behind its start; text goes on behind the largest
        places = [[0, 0, 0]]
        places += [[1, 1 + cell // GRID, 1 + cell % GRID] for cell in range(TOKENS)]
        places += [[1 + GRID] * 3]
        targets, owner, weights = [-100] * len(ids), [0] * len(ids), [0.0] * len(ids)
        for number, asked in enumerate(questions):
            prompt = self._encode(asked.question + BEHIND)
            answer = [*self._encode(asked.answer), END]
            branch = prompt + answer[:-1]
            places += [[2 + GRID + offset] * 3 for offset in range(len(branch))]
            targets += [-100] * (len(prompt) - 1) + answer
            weights += [0.0] * (len(prompt) - 1) + self._weights(asked, len(answer))
            owner += [number + 1] * len(branch)
            ids += branch
        return ids, places, targets, owner, weights

    def _weights(self, asked: Asked, size: int) -> list[float]:
        """The fact counts, and the token behind it, which says that it ends; the form of the answer is easy."""
        begins = asked.answer.index(f" {asked.fact}")
        first = len(self._encode(asked.answer[:begins]))
        last = len(self._encode(asked.answer[: begins + 1 + len(asked.fact)]))
        return [1.0 if first <= place <= last else FORM for place in range(size)]

    def answers(self, features: Tensor, read: Branches) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [answers' tokens, vocabulary], what they should be and what each counts.

        ``features`` are [pictures, TOKENS, hidden].
        """
        # a copy: where features go, the gradient of the table is none
        embedded = self.table[read.ids].clone()
        embedded[read.ids == IMAGE] = features.flatten(0, 1)
        hidden = self.model(
            inputs_embeds=embedded,
            position_ids=read.places,
            attention_mask={"full_attention": read.mask},
            use_cache=False,
        ).last_hidden_state
        wanted = read.targets >= 0
        logits: Tensor = Halved.apply(hidden[wanted], self._halved)  # type: ignore[no-untyped-call]
        return logits, read.targets[wanted], read.weights[wanted]


def right_by_question(logits: Tensor, wanted: Tensor) -> list[bool]:
    """Of every question, whether each token of its answer is the most likely one."""
    found, is_right = [], True
    for same, token in zip((logits.argmax(-1) == wanted).tolist(), wanted.tolist(), strict=True):
        is_right = is_right and same
        if token == END:
            found.append(is_right)
            is_right = True
    return found
