"""Prompts that come back with their log probabilities, as harnesses ask for them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime import GenerationConfig, Policy, QwenService
from qwen_onnx.runtime.engines.serial import SerialEngine
from qwen_onnx.runtime.server.app import create_app
from qwen_onnx.runtime.service.secure import GuardedService
from tests.fixtures.servers import ROOMY, in_thread
from tests.runtime.server.api.test_completions import ask

TEXTS = ["once upon a time", "The capital of France is", "für Åse: 日本", "x"]


def echoed(client: OpenAI, **changes: Any) -> Any:
    return ask(client, **{"echo": True, "max_tokens": 0, "logprobs": 1, **changes})


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_is_told_token_by_token(client: OpenAI, service: QwenService, text: str) -> None:
    ids = service.tokenizer.encode(text)
    whole = echoed(client, prompt=text)
    (choice,) = whole.choices
    assert (choice.text, choice.finish_reason) == (text, "length")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 0)
    told = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == len(ids)
    assert told.token_logprobs[0] is None
    assert told.top_logprobs[0] is None
    assert all(value < 0 for value in told.token_logprobs[1:])
    assert all(len(top) == 1 for top in told.top_logprobs[1:])
    assert told.text_offset[0] == 0
    assert sorted(told.text_offset) == told.text_offset


def test_ids_texts_and_several_prompts_are_told_alike(client: OpenAI, service: QwenService) -> None:
    single = [echoed(client, prompt=text).choices[0] for text in TEXTS]
    ids = [service.tokenizer.encode(text) for text in TEXTS]
    for several in (echoed(client, prompt=TEXTS), echoed(client, prompt=ids)):
        assert [choice.index for choice in several.choices] == list(range(len(TEXTS)))
        assert [choice.text for choice in several.choices] == TEXTS
        assert [choice.logprobs for choice in several.choices] == [choice.logprobs for choice in single]
    assert echoed(client, prompt=ids[0]).choices[0].logprobs == single[0].logprobs


def test_an_answer_follows_the_prompt_in_one_list(client: OpenAI) -> None:
    plain, both = ask(client, logprobs=2).choices[0], echoed(client, max_tokens=8, logprobs=2).choices[0]
    assert both.text == "once" + plain.text
    assert both.logprobs.tokens[4:] == plain.logprobs.tokens
    assert both.logprobs.token_logprobs[4:] == pytest.approx(plain.logprobs.token_logprobs, abs=1e-3)


def test_what_lm_eval_sums_up_is_the_likelihood_of_the_continuation(client: OpenAI, service: QwenService) -> None:
    """It sends one token more than it asks about and drops it, also where that token ended the answer."""
    context, continuation = service.tokenizer.encode("once upon"), service.tokenizer.encode(" a time")
    request = {"prompt": [context + continuation], "max_tokens": 1, "logprobs": 1, "seed": 1234}
    exact = echoed(client, prompt=context + continuation).choices[0].logprobs.token_logprobs[len(context) :]
    for bias in (None, {"1": 100}):
        told = echoed(client, **request, **({"logit_bias": bias} if bias else {})).choices[0]
        assert told.finish_reason == ("stop" if bias else "length")
        assert told.logprobs.token_logprobs[len(context) : -1] == pytest.approx(exact)
        assert len(told.logprobs.top_logprobs) == len(context) + len(continuation) + 1


def test_echo_without_log_probabilities_is_text(client: OpenAI) -> None:
    choice = echoed(client, logprobs=None).choices[0]
    assert (choice.text, choice.logprobs) == ("once", None)
    assert ask(client, echo=True).choices[0].text == "once" + ask(client).choices[0].text


def test_a_stop_string_in_the_prompt_stops_nothing(client: OpenAI) -> None:
    assert echoed(client, stop="nce").choices[0].text == "once"


def test_special_tokens_come_back_as_they_are_written(client: OpenAI) -> None:
    choice = echoed(client, prompt=[0, *range(40, 44), 1]).choices[0]
    assert choice.text.startswith("<|im_start|>")
    assert choice.text.endswith("<|im_end|>")


@pytest.fixture
def serial(tiny_artifact: Path) -> Iterator[int]:
    """The port of a server whose engine is genai's."""
    service = QwenService(tiny_artifact, threads=1)
    service.engine.close()
    service.engine = SerialEngine(tiny_artifact, threads=1)
    with in_thread(create_app(service, "tiny", ROOMY), ROOMY) as port:
        yield port


def test_an_engine_that_cannot_tell_says_so(serial: int) -> None:
    body = {"model": "tiny", "prompt": "once", "max_tokens": 0, "echo": True, "logprobs": 1}
    refused = httpx.post(f"http://127.0.0.1:{serial}/v1/completions", json=body, trust_env=False)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "echo"
    assert "not supported by this model's engine" in refused.json()["error"]["message"]


def test_a_python_program_scores_too(service: QwenService) -> None:
    done = service.generate("once upon", GenerationConfig(echo=True, max_new_tokens=0, logprobs=0))
    assert (done.text, done.completion_tokens, done.finish_reason) == ("once upon", 0, "length")
    assert done.logprobs[0].logprob is None
    assert all(math.isfinite(entry.logprob or 0) for entry in done.logprobs)


def test_limits_hold_for_echo(service: QwenService) -> None:
    guarded = GuardedService(service, Policy(max_input_characters=30, sanitise=True))
    script = "<script>alert(1)</script>"
    back = GenerationConfig(echo=True, max_new_tokens=0)
    for prompt in (script, service.tokenizer.encode(script)):
        assert guarded.generate(prompt, back).text == "[removed]"
    with pytest.raises(RequestError, match="30"):
        guarded.generate("x" * 31, back)
    with pytest.raises(RequestError, match="max_new_tokens"):
        GenerationConfig(max_new_tokens=0)
