"""The starter's language model, frozen, and what it answers to features in the places of a picture's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.starter_vl.questions import Asked
from training.starter_vl.scenes import GRID

# ids of special tokens that the starter has and never uses; the batch engine tries itself out with the ids 1 to 9
VISION_START, IMAGE, VISION_END, VIDEO = 13, 14, 15, 16
END, TOKENS, WIDTH = 2, GRID**2, 576
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
    """

    ids: Tensor
    mask: Tensor
    places: Tensor
    targets: Tensor


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
        self.table = self.model.embed_tokens.weight
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        self._before = self._encode(BEFORE)
        self._cached = self._read_before()

    def _encode(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return found

    @torch.no_grad()
    def _read_before(self) -> list[tuple[Tensor, Tensor]]:
        from transformers import DynamicCache

        cache = DynamicCache()
        self.model(inputs_embeds=self.table[None, self._before], past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def words(self, text: str) -> Tensor:
        """The mean embedding of a word's tokens."""
        found: Tensor = self.table[self._encode(f" {text}")].mean(0)
        return found

    def branches(self, asked: Sequence[Sequence[Asked]]) -> Branches:
        """Of several pictures with their questions."""
        rows, past = [self._row(questions) for questions in asked], len(self._before)
        ids = torch.tensor([token for row in rows for token in row[0]])
        places = torch.tensor([place for row in rows for place in row[1]]).T + past
        targets = torch.tensor([target for row in rows for target in row[2]])
        picture = torch.tensor([number for number, row in enumerate(rows) for _ in row[0]])
        owner = torch.tensor([one for row in rows for one in row[3]])
        own = (owner[:, None] == owner[None]) | (owner[None] == 0)
        seen = (own & (picture[:, None] == picture[None])).tril()
        seen = torch.cat((torch.ones(len(ids), past, dtype=torch.bool), seen), dim=1)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return Branches(ids[None], mask[None, None], places[:, None], targets[None])

    def _row(self, questions: Sequence[Asked]) -> tuple[list[int], list[list[int]], list[int], list[int]]:
        ids = [VISION_START, *[IMAGE] * TOKENS, VISION_END]
        # a picture's positions begin behind its start; text goes on behind the largest
        places = [[0, 0, 0]]
        places += [[1, 1 + cell // GRID, 1 + cell % GRID] for cell in range(TOKENS)]
        places += [[1 + GRID] * 3]
        targets, owner = [-100] * len(ids), [0] * len(ids)
        for number, asked in enumerate(questions):
            prompt = self._encode(asked.question + BEHIND)
            answer = [*self._encode(asked.answer), END]
            branch = prompt + answer[:-1]
            places += [[2 + GRID + offset] * 3 for offset in range(len(branch))]
            targets += [-100] * (len(prompt) - 1) + answer
            owner += [number + 1] * len(branch)
            ids += branch
        return ids, places, targets, owner

    def answers(self, features: Tensor, read: Branches) -> tuple[Tensor, Tensor]:
        """Logits [answers' tokens, vocabulary] and what they should be; ``features`` are [pictures, TOKENS, hidden]."""
        from transformers import DynamicCache

        # a copy: where features go, the gradient of the table is none
        embedded = self.table[read.ids].clone()
        embedded[read.ids == IMAGE] = features.flatten(0, 1)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self._cached):
            cache.update(keys, values, layer)
        hidden = self.model(
            inputs_embeds=embedded,
            position_ids=read.places,
            attention_mask={"full_attention": read.mask},
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        wanted = read.targets >= 0
        return hidden[wanted] @ self.table.T, read.targets[wanted]


def right_by_question(logits: Tensor, wanted: Tensor) -> list[bool]:
    """Of every question, whether each token of its answer is the most likely one."""
    found, is_right = [], True
    for same, token in zip((logits.argmax(-1) == wanted).tolist(), wanted.tolist(), strict=True):
        is_right = is_right and same
        if token == END:
            found.append(is_right)
            is_right = True
    return found
