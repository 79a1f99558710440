"""Which tokens count in the loss, what is too long, and what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.errors import TrainingError
from qwen_onnx.finetune.data import Example, Retained
from qwen_onnx.finetune.encode import IGNORED, Encoded, encode, encode_retained, split
from tests.fixtures.models import byte_tokenizer

PATH = Path("examples.jsonl")
TALK = Example(
    7,
    tuple(
        {"role": role, "content": content}
        for role, content in (("user", "One?"), ("assistant", "Yes."), ("user", "Two?"), ("assistant", "No."))
    ),
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def _plain(messages: Sequence[dict[str, str]], *, prompt: bool = False) -> str:
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)
    return text + ("<|im_start|>assistant\n" if prompt else "")


def _forgetful(messages: Sequence[dict[str, str]], *, prompt: bool = False) -> str:
    """As templates of reasoning models: the last answer alone shows that nothing was thought."""
    last = len(messages) - 1
    text = ""
    for place, turn in enumerate(messages):
        thought = "<think></think>" if turn["role"] == "assistant" and place == last else ""
        text += f"<|im_start|>{turn['role']}\n{thought}{turn['content']}<|im_end|>\n"
    return text + ("<|im_start|>assistant\n" if prompt else "")


def _encoded(render: Any, tokenizer: Any, example: Example = TALK, window: int = 4096, longer: Any = "refuse") -> Any:
    return encode([example], render, tokenizer, window=window, longer=longer, path=PATH)


def _counted(row: Encoded, tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != IGNORED]))


def test_the_loss_is_on_answers_and_their_end_alone(tokenizer: Any) -> None:
    [row], notes = _encoded(_plain, tokenizer)
    assert _counted(row, tokenizer) == "Yes.<|im_end|>\nNo.<|im_end|>\n"
    assert tokenizer.decode(row.ids) == _plain(TALK.messages)
    assert all(label in (IGNORED, token) for token, label in zip(row.ids, row.labels, strict=True))
    assert not notes


def test_a_template_that_rewrites_earlier_answers_gives_a_row_for_each(tokenizer: Any) -> None:
    rows, _ = _encoded(_forgetful, tokenizer)
    assert [_counted(row, tokenizer) for row in rows] == [
        "<think></think>Yes.<|im_end|>\n",
        "<think></think>No.<|im_end|>\n",
    ]
    assert tokenizer.decode(rows[1].ids).count("<think>") == 1


def test_a_template_that_rewrites_questions_is_refused(tokenizer: Any) -> None:
    def render(messages: Sequence[dict[str, str]], *, prompt: bool = False) -> str:
        return f"{len(messages)} messages\n" + _plain(messages, prompt=prompt)

    with pytest.raises(TrainingError, match=r"line 7: the chat template writes a question otherwise"):
        _encoded(render, tokenizer)


def test_an_example_that_is_too_long_is_refused_cut_or_left_out(tokenizer: Any) -> None:
    length = len(_encoded(_plain, tokenizer)[0][0].ids)
    with pytest.raises(TrainingError, match=rf"line 7: {length} tokens, a window holds {length - 1}"):
        _encoded(_plain, tokenizer, window=length - 1)
    [cut], notes = _encoded(_plain, tokenizer, window=length - 1, longer="truncate")
    assert len(cut.ids) == len(cut.labels) == length - 1
    assert notes == [f"too long for the window of {length - 1} tokens, cut: line 7"]
    with pytest.raises(TrainingError, match="no example is left") as caught:
        _encoded(_plain, tokenizer, window=length - 1, longer="skip")
    assert "left out: line 7" in str(caught.value)
    # what is left of it has no answer
    with pytest.raises(TrainingError, match="no example is left"):
        _encoded(_plain, tokenizer, window=10, longer="truncate")


def _rows(count: int) -> list[Encoded]:
    return [Encoded(line, [line], [line]) for line in range(count)]


def test_the_split_follows_from_the_seed_and_loses_nothing() -> None:
    learnt, held = split(_rows(40), 0.1, 3, PATH)
    assert len(held) == 4
    assert sorted(row.line for row in [*learnt, *held]) == list(range(40))
    assert split(_rows(40), 0.1, 3, PATH) == (learnt, held)
    assert split(_rows(40), 0.1, 4, PATH)[1] != held


def test_nothing_is_learnt_and_held_out_at_once() -> None:
    twice = [*_rows(20), *[Encoded(row.line + 20, row.ids, row.labels) for row in _rows(20)]]
    learnt, held = split(twice, 0.25, 0, PATH)
    assert not {tuple(row.ids) for row in learnt} & {tuple(row.ids) for row in held}


def test_every_token_of_what_is_retained_counts_and_a_long_text_gives_several_rows(tokenizer: Any) -> None:
    told = [Retained(3, "Rain falls."), Retained(4, TALK.messages)]
    whole = encode_retained(told, _plain, tokenizer, window=4096, path=PATH)
    assert [tokenizer.decode(row.ids) for row in whole] == ["Rain falls.", _plain(TALK.messages)]
    assert all(row.ids == row.labels for row in whole)
    pieces = encode_retained(told, _plain, tokenizer, window=16, path=PATH)
    assert max(len(row.ids) for row in pieces) == 16
    assert [row.line for row in pieces] == [3, *[4] * (len(pieces) - 1)]
    assert [token for row in pieces for token in row.ids] == [token for row in whole for token in row.ids]

    def refuse(messages: Sequence[dict[str, str]], *, prompt: bool = False) -> str:
        raise TrainingError("no roles here")

    with pytest.raises(TrainingError, match="line 4: no roles here"):
        encode_retained(told, refuse, tokenizer, window=16, path=PATH)


@pytest.mark.parametrize("rows", [_rows(1), [Encoded(line, [1], [1]) for line in range(9)]])
def test_an_empty_split_is_refused(rows: list[Encoded]) -> None:
    with pytest.raises(TrainingError, match="none left to learn from"):
        split(rows, 0.1, 0, PATH)
