"""Text completions by the openai client."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI

from qwen_onnx.runtime import QwenService


def ask(client: OpenAI, **changes: Any) -> Any:
    return client.completions.create(
        **{"model": "tiny", "prompt": "once", "max_tokens": 8, "temperature": 0, "seed": 1, **changes}
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prompt": ["once", "twice"], "n": 2, "temperature": 1},
        {"logprobs": 2},
        {"logprobs": 0, "stop": ["\n"], "max_tokens": 40},
    ],
)
def test_streamed_and_whole_answers_agree(client: OpenAI, changes: dict[str, Any]) -> None:
    whole = ask(client, **changes)
    texts = {choice.index: "" for choice in whole.choices}
    reasons, lists = dict.fromkeys(texts), {index: ([], [], []) for index in texts}  # type: ignore[var-annotated]
    chunks = list(ask(client, **changes, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
            if choice.logprobs:
                told = (choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.text_offset)
                for so_far, more in zip(lists[choice.index], told, strict=True):
                    so_far.extend(more)
    assert [texts[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]
    assert [reasons[choice.index] for choice in whole.choices] == [choice.finish_reason for choice in whole.choices]
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    for choice in whole.choices if "logprobs" in changes else []:
        told = (choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.text_offset)
        assert lists[choice.index] == told


def test_prompts_of_ids_are_prompts_of_text(client: OpenAI, service: QwenService) -> None:
    ids = [service.tokenizer.encode(text) for text in ("once", "twice")]
    texts = ask(client, prompt=["once", "twice"])
    assert [choice.text for choice in texts.choices] == [choice.text for choice in ask(client, prompt=ids).choices]
    assert texts.choices[0].text == ask(client, prompt=ids[0]).choices[0].text
    assert [choice.index for choice in texts.choices] == [0, 1]
    assert texts.usage.prompt_tokens == sum(map(len, ids))


def test_logprobs_tell_tokens_alternatives_and_places(client: OpenAI) -> None:
    told = ask(client, logprobs=3).choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == 8
    assert told.text_offset == [sum(map(len, told.tokens[:index])) for index in range(8)]
    assert all(max(top.values()) == own for top, own in zip(told.top_logprobs, told.token_logprobs, strict=True))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"echo": True, "stream": True}, "echo"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 0, "stream": True}, "max_tokens is 0"),
        ({"echo": True, "max_tokens": -1}, "max_tokens"),
        ({"echo": True, "max_tokens": 0, "prompt": "x" * 9000}, "context"),
        ({"echo": True, "max_tokens": 0, "logprobs": 20, "n": 8, "prompt": ["x" * 3500]}, "echo would tell 588000"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [100_000]}, "100000"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 21}, "21 answers"),
        ({"logprobs": 21}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_cannot_be_served_is_a_400_that_names_it(client: OpenAI, changes: dict[str, Any], expected: str) -> None:
    extra = {"extra_body": {"messages": changes.pop("messages")}} if "messages" in changes else {}
    with pytest.raises(openai.BadRequestError, match=expected):
        ask(client, **changes, **extra)


def test_neutral_values_are_accepted(client: OpenAI) -> None:
    assert ask(client, echo=False, suffix="", best_of=1).choices == ask(client).choices
