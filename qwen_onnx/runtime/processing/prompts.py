"""Prompts for common work, in the words that Qwen's model cards recommend.

They are messages: nothing here writes a control token, so what users give stays text (``QwenService.encode_chat``).
The one exception is ``fill_in_the_middle``, a format of base models that is defined by its tokens; it gives token ids.

>>> from qwen_onnx.runtime import prompts
>>> prompts.translate("Good morning", into="Polish")[1]
{'role': 'user', 'content': 'Good morning'}
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.processing.tokenizer import TextTokenizer

# https://huggingface.co/Qwen/Qwen2.5-Math-7B-Instruct#quick-start, https://huggingface.co/Qwen/QwQ-32B#usage-guidelines
STEP_BY_STEP = "Please reason step by step, and put your final answer within \\boxed{}."
CHOICE = 'Please show your choice in the `answer` field with only the choice letter, e.g., `"answer": "C"`.'
# https://huggingface.co/Qwen/Qwen2.5-Coder-7B#fill-in-the-middle
FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


def reasoning(question: str, *, choices: Sequence[str] = ()) -> list[dict[str, str]]:
    """A question to be thought through, its answer in ``\\boxed{}``; with ``choices`` a letter in the ``answer`` field.

    The instruction stands in the question, as QwQ's and Qwen3's cards have it; Qwen2.5-Math's has the same words as the
    system message.

    Raises:
        RequestError: no question, or more choices than letters.
    """
    _require(question, "question")
    if not choices:
        return [_user(f"{question}\n\n{STEP_BY_STEP}")]
    if len(choices) > len(string.ascii_uppercase):
        raise RequestError(f"{len(choices)} choices, the most is {len(string.ascii_uppercase)}", where="choices")
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False))
    return [_user(f"{question}\n\n{listed}\n\n{CHOICE}")]


def coding(task: str, *, language: str, context: str = "") -> list[dict[str, str]]:
    """A programming task in ``language``; ``context`` is code that the answer builds on.

    Raises:
        RequestError: no task or no language.
    """
    _require(task, "task")
    _require(language, "language")
    system = f"You write {language}. Give complete, working code in one fenced code block, then explain it briefly."
    if not context:
        return [_system(system), _user(task)]
    # a fence longer than any in the code, as CommonMark has it
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", context)), default=0))
    return [_system(system), _user(f"{task}\n\n{fence}{language.lower()}\n{context}\n{fence}")]


def multilingual(question: str, *, language: str) -> list[dict[str, str]]:
    """A question in any language, to be answered in ``language``, e.g. Polish.

    Raises:
        RequestError: no question or no language.
    """
    _require(question, "question")
    _require(language, "language")
    return [_system(f"Answer in {language}, whatever language the question is in."), _user(question)]


def translate(text: str, *, into: str, source: str | None = None) -> list[dict[str, str]]:
    """A text to be translated ``into`` a language; without ``source`` the model finds out what it is written in.

    Raises:
        RequestError: no text or no language.
    """
    _require(text, "text")
    _require(into, "into")
    origin = f" from {source}" if source else ""
    instruction = f"Translate what the user writes{origin} into {into}. Output the translation only."
    return [_system(instruction), _user(text)]


def fill_in_the_middle(prefix: str, suffix: str, tokenizer: TextTokenizer) -> list[int]:
    """Token ids with which a base model of Qwen2.5-Coder writes what stands between ``prefix`` and ``suffix``.

    Markers inside the code stay text.

    Raises:
        RequestError: the model has no such tokens.
    """
    markers = []
    for token in FIM_TOKENS:
        ids = tokenizer.encode(token, allow_special=True, add_special_tokens=False)
        if len(ids) != 1:
            raise RequestError(
                f"this model has no token {token}", where="prefix", hint="use a base model of Qwen2.5-Coder"
            )
        markers.append(ids)
    before, after, middle = markers
    return before + _plain(prefix, tokenizer) + after + _plain(suffix, tokenizer) + middle


def _plain(text: str, tokenizer: TextTokenizer) -> list[int]:
    """Code as text. Qwen's tokenizers do not call these tokens special, so each typed one is encoded in two halves."""
    pieces = re.split("(?<=<)(?=" + "|".join(re.escape(token[1:]) for token in FIM_TOKENS) + ")", text)
    return [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]


def _require(text: str, name: str) -> None:
    if not text.strip():
        raise RequestError(f"{name} is empty", where=name)


def _system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
