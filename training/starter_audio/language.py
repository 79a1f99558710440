"""The starter's language model, frozen, and what it answers to vectors in the places of a sound's tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.starter_audio.sounds import DIGITS, MOST_DIGITS

END = 2
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# the template's text around a sound
SHOWN = ("Digits:", "\n")
BEFORE = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{SHOWN[0]}"
BEHIND = "<|im_end|>\n<|im_start|>assistant\n"
QUESTIONS = {
    "training": (
        "Which digits do you hear?",
        "What digits are said?",
        "Which digits were spoken?",
        "What do you hear?",
        "What is said?",
        "Repeat the digits.",
        "Write down the digits that you hear.",
        "Tell me the digits in this recording.",
    ),
    "exam": (
        "Which digits are spoken here?",
        "What digits do you hear in this sound?",
        "List the digits that are said.",
        "What does the voice say?",
    ),
}


def answer_to(digits: Sequence[int]) -> str:
    """As the language model begins by itself: without a sentence around it."""
    return ", ".join(DIGITS[digit] for digit in digits) + "."


@dataclass(frozen=True)
class Asked:
    """A question about a sound: what each of its tokens says (0: nothing), and the digits."""

    tokens: list[int]
    digits: list[int]
    question: str


def asked(chance: random.Random, split: str) -> Asked:
    """About a sound that nobody made: what the tower would say of it."""
    digits = [chance.randrange(10) for _ in range(chance.randint(1, MOST_DIGITS))]
    apart = chance.uniform(2, 8)
    tokens: list[int] = [0] * chance.randint(1, 9)
    for digit in digits:
        tokens += [0] * max(1, round(chance.gauss(apart, 1.5))) + [digit + 1]
    return Asked(tokens + [0] * chance.randint(1, 10), digits, chance.choice(QUESTIONS[split]))


class Language:
    """The starter in bfloat16, none of whose weights changes."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoTokenizer, Qwen2ForCausalLM

        # for rows this short PyTorch's flash attention takes half of the time, backwards
        model = Qwen2ForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, attn_implementation="eager")
        self.model: Any = model.eval()
        self.model.requires_grad_(False)
        self.table: Tensor = self.model.model.embed_tokens.weight
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        self._before = self.encode(BEFORE)
        with torch.no_grad():
            # the system's message is the same for all
            self._past = self.model.model(torch.tensor([self._before]), use_cache=True).past_key_values

    def encode(self, text: str) -> list[int]:
        """Ids of tokens."""
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return found

    def first_words(self) -> Tensor:
        """[SAID, OUTPUT] embeddings of a line's end and of the digits' words."""
        ids = [self.encode("\n")[0], *(self.encode(f" {word}")[0] for word in DIGITS)]
        return self.table[ids].float()

    def answers(self, rows: Sequence[Asked], features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [answers' tokens, vocabulary], what they should be, and of which row each is.

        ``features`` [tokens, OUTPUT] are of each row.
        """
        from transformers import DynamicCache

        texts = [self._text(row) for row in rows]
        longest = max(len(feature) + len(ids) for feature, (ids, _) in zip(features, texts, strict=True))
        embedded, targets = [], []
        for feature, (ids, begins) in zip(features, texts, strict=True):
            filled = longest - len(feature) - len(ids)
            text = self.table[torch.tensor(ids + [END] * filled)]
            embedded.append(torch.cat((feature.to(torch.bfloat16), text)))
            # the token behind each place
            before = [-1] * (len(feature) + begins - 1)
            targets.append(before + ids[begins:] + [-1] * (filled + 1))
        size = (len(rows), -1, -1, -1)
        past = DynamicCache([(layer.keys.expand(size), layer.values.expand(size)) for layer in self._past.layers])
        hidden = self.model.model(inputs_embeds=torch.stack(embedded), past_key_values=past).last_hidden_state
        target = torch.tensor(targets)
        wanted = target >= 0
        owner = torch.arange(len(rows))[:, None].expand_as(target)[wanted]
        return self.model.lm_head(hidden[wanted]).float(), target[wanted], owner

    def _text(self, row: Asked) -> tuple[list[int], int]:
        """What follows the sound, and where in it the answer begins."""
        prompt = self.encode(SHOWN[1] + row.question + BEHIND)
        return [*prompt, *self.encode(answer_to(row.digits)), END], len(prompt)
