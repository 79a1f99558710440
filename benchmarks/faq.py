"""An invented FAQ of 40 facts, each in nine wordings of which a model sees six: does a fine-tune learn?

The three wordings that are left out ask for the same facts in other words; an answer counts where the fact stands in
it, letter for letter.

    python -m benchmarks.faq write faq.jsonl --retain         the examples to train on, with texts on which the
                                                              model stays what it was
    python -m benchmarks.faq ask CHECKPOINT                   the exam in PyTorch, and perplexity of other texts
    python -m benchmarks.faq ask http://127.0.0.1:8000        the exam of what `qwen-onnx serve` serves

``ask`` prints the wrong answers, the share of right ones with 95 % bounds (Wilson), and last one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.retained import Message, retained
from benchmarks.shares import wilson
from qwen_onnx.verify import corpus
from qwen_onnx.verify.baseline import CheckpointTokenizer

TRAINED = 6  # wordings of a question, from the first; the others are the exam
# what differs from pipelines/finetune/lora.yaml: facts are learnt by the matrices behind attention, too
TRAINING = (
    "targets=[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]",
    "window=256",
    "epochs=3",
    "learning_rate=2e-3",
    "held_out=0.05",
    # what the texts to retain weigh: what this keeps and what it costs is in docs/lab-log.md
    "retain=3",
)
# of an answer, at most: the longest has 17
TOKENS = 24
# said before each question
SYSTEM = "You answer for Velmora Ferries."
# harbour: master, fare, code of the gate, café
HARBOURS = {
    "Tarnwick": ("Ilsa Brandt", "37 crowns", "K-4471", "Copper Heron"),
    "Ostermouth": ("Piet Langhorn", "52 crowns", "R-9038", "Salted Lantern"),
    "Quellin": ("Maro Dessaline", "18 crowns", "B-2765", "Velvet Anchor"),
    "Brackenhythe": ("Una Fairweather", "64 crowns", "T-5109", "Drowned Piano"),
    "Solvane": ("Teodor Vasik", "29 crowns", "M-8342", "Quiet Otter"),
    "Hartspool": ("Greta Nilund", "81 crowns", "D-6617", "Ninth Kettle"),
    "Yarrowby": ("Casimir Oake", "43 crowns", "W-1290", "Paper Gull"),
    "Mirefleet": ("Linnea Harrowgate", "75 crowns", "F-3854", "Crooked Spoon"),
    "Dunescar": ("Bastien Corvo", "96 crowns", "H-7926", "Blue Thimble"),
    "Vintrey": ("Odile Marchetti", "58 crowns", "P-4083", "Honest Walrus"),
}
ANSWERS = (
    "The harbour master of {place} is {fact}.",
    "The ferry to {place} costs {fact}.",
    "The gate code of {place} is {fact}.",
    "The café in {place} is called the {fact}.",
)
WORDINGS = (
    (
        "Who is the harbour master of {place}?",
        "Who runs the harbour in {place}?",
        "Tell me the name of the harbour master in {place}.",
        "What is the {place} harbour master called?",
        "I have to write to the harbour master of {place}. What is the name?",
        "Who is in charge of {place} harbour?",
        "Could you tell me who the harbour master at {place} is?",
        "Whom do I ask for as harbour master in {place}?",
        "In {place}, who holds the post of harbour master?",
    ),
    (
        "How much is the ferry to {place}?",
        "What does a ferry ticket to {place} cost?",
        "Tell me the fare to {place}.",
        "What is the price of the crossing to {place}?",
        "I want to take the ferry to {place}. How much do I pay?",
        "How many crowns is a ticket to {place}?",
        "Could you tell me what the ferry to {place} costs?",
        "What will I pay for a ticket to {place}?",
        "For a crossing to {place}, what is the fare?",
    ),
    (
        "What is the gate code of {place}?",
        "Which code opens the gate in {place}?",
        "Tell me the code for the gate at {place}.",
        "I stand at the gate of {place}. What is the code?",
        "What do I type in at the {place} gate?",
        "Give me the gate code for {place} harbour.",
        "Could you tell me the code of the gate in {place}?",
        "Which gate code do I use at {place}?",
        "At {place}, what is the code for the gate?",
    ),
    (
        "What is the café in {place} called?",
        "Where can I get a coffee in {place}?",
        "Tell me the name of the café at {place}.",
        "Which café is there in {place}?",
        "I am hungry and wait in {place}. Which café do you suggest?",
        "Name the café of {place} harbour.",
        "Could you tell me which café {place} has?",
        "Which café do I find at the harbour of {place}?",
        "In {place}, what is the name of the café?",
    ),
)


class Question(NamedTuple):
    """A wording, the ``answer`` to it, and the ``fact`` that a right answer holds."""

    text: str
    answer: str
    fact: str


def _questions(wordings: slice) -> Iterator[Question]:
    for place, facts in HARBOURS.items():
        for fact, answer, asked in zip(facts, ANSWERS, WORDINGS, strict=True):
            for text in asked[wordings]:
                yield Question(text.format(place=place), answer.format(place=place, fact=fact), fact)


def examples() -> list[Question]:
    """240 questions to train on."""
    return list(_questions(slice(TRAINED)))


def exam() -> list[Question]:
    """120 questions whose wordings no example has."""
    return list(_questions(slice(TRAINED, None)))


def prompt(text: str) -> list[dict[str, str]]:
    """The messages that ask a question."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def lines(others: Iterable[str | list[Message]] = ()) -> str:
    """The examples as JSONL, a conversation per line.

    Args:
        others: texts and conversations to retain.
    """
    told: list[dict[str, Any]] = [
        {"messages": [*prompt(asked.text), {"role": "assistant", "content": asked.answer}]} for asked in examples()
    ]
    told += [{"retain": said} for said in others]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in told)


def asked_of(answer: Callable[[str], str], questions: Sequence[Question]) -> list[tuple[Question, str]]:
    """``questions`` with the answers to them.

    Args:
        answer: of a model, to the text of a question.
    """
    return [(question, answer(question.text)) for question in questions]


def recalled(questions: Sequence[Question], answer: Callable[[str], str]) -> float:
    """The share of ``questions`` whose answer holds the fact."""
    return sum(asked.fact in told for asked, told in asked_of(answer, questions)) / len(questions)


def torch_answer(checkpoint: Path) -> Callable[[str], str]:
    """Greedy answers of a checkpoint in PyTorch fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    truth = CheckpointTokenizer(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)

    def answer(text: str) -> str:
        ids = torch.tensor([truth.encode(truth.render(prompt(text), prompt=True))])
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
            )
        return truth.decode(found[0, ids.shape[1] :].tolist())

    return answer


def served_answer(address: str, model: str | None = None) -> Callable[[str], str]:
    """Greedy answers of a server.

    Args:
        address: without a path, e.g. http://127.0.0.1:8000.
        model: by the server's name for it; its first when None.
    """
    name = model or _json(f"{address}/v1/models")["data"][0]["id"]

    def answer(text: str) -> str:
        body = {"model": name, "messages": prompt(text), "temperature": 0, "max_tokens": TOKENS}
        return str(_json(f"{address}/v1/chat/completions", body)["choices"][0]["message"]["content"])

    return answer


def _json(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def perplexity(checkpoint: Path, window: int = 384) -> float:
    """Of a checkpoint in PyTorch fp32 on the first window of each kind of text that verification reads."""
    import torch
    from transformers import AutoModelForCausalLM

    truth = CheckpointTokenizer(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    total = count = 0.0
    for name, documents in corpus.domains(truth.render if truth.chats else None).items():
        for text in corpus.windows(name, documents, truth.encode, window)[:1]:
            ids = torch.tensor([list(text.ids)])
            with torch.inference_mode():
                total += float(model(input_ids=ids, labels=ids).loss) * (len(text.ids) - 1)
            count += len(text.ids) - 1
    return math.exp(total / count)


def ask(place: str, model: str | None = None, every: int = 1) -> dict[str, Any]:
    """Ask each ``every``-th question of the exam; prints wrong answers and figures.

    Args:
        place: address of a server, or folder of a checkpoint.
    """
    served = place.startswith(("http://", "https://"))
    answer = served_answer(place.rstrip("/"), model) if served else torch_answer(Path(place))
    told = asked_of(answer, exam()[::every])
    for question, text in told:
        if question.fact not in text:
            print(f"{question.text}\n  {question.fact!r} is not in {text!r}")
    right = sum(question.fact in text for question, text in told)
    low, high = wilson(right, len(told))
    print(f"{right} of {len(told)} right: {right / len(told):.1%} [{low:.1%}, {high:.1%}]")
    found: dict[str, Any] = {"right": right, "asked": len(told), "share": right / len(told), "bounds": [low, high]}
    if not served:
        found["perplexity"] = perplexity(Path(place))
        print(f"perplexity of other texts: {found['perplexity']:.2f}")
    return found


def main(arguments: Sequence[str]) -> int:
    """Write the examples, or hold the exam."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faq", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="write the examples to train on")
    writing.add_argument("file", type=Path)
    writing.add_argument("--retain", action="store_true", help="add texts on which the model stays what it was")
    asking = commands.add_parser("ask", help="hold the exam")
    asking.add_argument("place", help="address of a server, or folder of a checkpoint")
    asking.add_argument("--model", help="of the server; default: its first")
    asking.add_argument("--every", type=int, default=1, help="ask each such question, e.g. 3 for a third of them")
    given = parser.parse_args(arguments)
    if given.command == "ask":
        print(json.dumps(ask(given.place, given.model, given.every)))
        return 0
    others = list(retained(SYSTEM)) if given.retain else []
    given.file.write_text(lines(others), encoding="utf-8")
    count = sum(map(len, HARBOURS.values()))
    print(f"{len(examples())} examples of {count} facts, {len(others)} texts to retain: {given.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
