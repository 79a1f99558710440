"""A model's own answers to everyday questions, and passages of text, to be learnt beside what is new.

An adapter for new facts changes answers to everything else, too. Examples whose answers the model itself has drawn
hold it where it was (Huang et al. 2024, arXiv:2403.01244), and so does text as it stands. The texts are those of
calibration, not of verification.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from qwen_onnx.export import calibration
from qwen_onnx.verify.baseline import CheckpointTokenizer

QUESTIONS = (
    "How do I boil an egg?",
    "Why is the sky blue?",
    "Write a short poem about rain.",
    "What should I pack for a week in the mountains?",
    "Explain what a database index is.",
    "Give me three tips for better sleep.",
    "Who was Isaac Newton?",
    "What is the capital of Portugal?",
    "Tell me a story about a lost dog.",
    "How does a kite stay in the air?",
    "Write an e-mail that asks for a day off.",
    "What is 17 times 6?",
    "Translate into French: good morning.",
    "Name five animals that live in the desert.",
    "What is the difference between weather and climate?",
    "How do I learn to play the guitar?",
    "Summarise how bread is made.",
    "Is it safe to eat raw potatoes?",
    "Write a Python function that reverses a list.",
    "What does a lawyer do all day?",
    "My computer is slow. What can I do?",
    "How many days does a leap year have?",
    "Describe a sunset by the sea.",
    "Which planet is the largest?",
    "Explain photosynthesis to a child.",
    "How do I get a stain of coffee out of a shirt?",
    "What is the square root of 144?",
    "Recommend a book for a long train journey.",
    "Who wrote Hamlet?",
    "What happens when water freezes?",
    "Write a headline about a new bridge.",
    "How do I say no politely?",
)
# characters of a passage behind its beginning, at most
LONGEST = 450
# texts to go on with: characters of a beginning
BEGINNING = 80
# tokens of an answer, at most; prompts that are answered together
TOKENS, TOGETHER = 48, 64
# at 1 a small model says much that it does not mean, and learning that by heart is a change, too
TEMPERATURE = 0.7


def prompts(texts: int, seed: int = 0) -> list[str]:
    """The questions, and ``texts`` beginnings of code, documentation and texts in other languages."""
    draw = random.Random(seed)
    sources = [calibration.code(), "\n".join(calibration.topics().values()), calibration.multilingual()]
    begun = []
    for number in range(texts):
        source = sources[number % len(sources)]
        start = source.index("\n", draw.randrange(len(source) - 4 * BEGINNING)) + 1
        begun.append(f"Go on with this text:\n\n{source[start : start + BEGINNING].strip()}")
    return [*QUESTIONS, *begun]


def passages(topics: int = 10, pieces: int = 6) -> list[tuple[str, str]]:
    """Beginnings of calibration's texts with what follows there: other languages, documentation and code."""
    draw = random.Random(0)
    found = [_continued(text, 220) for text in calibration.multilingual().strip().split("\n\n")]
    sections = list(calibration.topics().items())
    draw.shuffle(sections)
    for name, text in sections[:topics]:
        found.append((f"What does Python's reference say about {name.lower()}?", text[:LONGEST].strip()))
    code = calibration.code()
    for _ in range(pieces):
        begin = code.find("\n    def ", draw.randrange(len(code) - 2000))
        found.append(_continued(code[begin : begin + 480], LONGEST))
    return found


def _continued(text: str, longest: int) -> tuple[str, str]:
    """The beginning of a text, which ends at a space where it has one, and at most ``longest`` characters behind."""
    text = text.strip()
    cut = text.find(" ", 60)
    cut = cut if cut > 0 else 30
    return f"Go on with this text:\n\n{text[:cut]}", text[cut : cut + longest].strip()


def rehearsed(checkpoint: Path, texts: int = 12, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Prompts with the answers that a checkpoint draws in PyTorch fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    truth = CheckpointTokenizer(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    torch.manual_seed(seed)
    asked = prompts(texts, seed)
    for begin in range(0, len(asked), TOGETHER):
        some = asked[begin : begin + TOGETHER]
        rows = [truth.encode(truth.render([{"role": "user", "content": text}], prompt=True)) for text in some]
        width = max(map(len, rows))
        # to the left of a prompt nothing is read
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=True, temperature=TEMPERATURE
            )
        for text, row in zip(some, found[:, width:], strict=True):
            answer = truth.decode(row.tolist()).partition("<|im_end|>")[0].strip()
            if answer:
                yield text, answer
