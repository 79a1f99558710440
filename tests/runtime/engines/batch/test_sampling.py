"""Sampling against transformers' own processors, and grammars against what they allow."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from llguidance import LLMatcher
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen_onnx.runtime import GenerationConfig, QwenService
from qwen_onnx.runtime.engines.batch.sampling import Sampler
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.sampling import Sampling

VOCABULARY = 2000
PROMPT = (3, 5, 5, 1999)


def scores(seed: int, spread: float = 3.0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(0, spread, VOCABULARY).astype(np.float32)


def drawn(options: Sampling, logits: np.ndarray[Any, Any], count: int = 3000) -> np.ndarray[Any, Any]:
    """How often each token comes first."""
    counts = np.zeros(VOCABULARY)
    for seed in range(count):
        changed = Sampling(**{**options.__dict__, "seed": seed})
        counts[Sampler(TokenRequest(PROMPT, 1, changed)).draw(logits)[0]] += 1
    return counts / count


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=1.3, top_p=0.6),
        Sampling(temperature=2.0, top_p=0.97),
        Sampling(temperature=1.0, min_p=0.2),
        Sampling(temperature=0.9, top_k=40, top_p=0.8, repetition_penalty=1.7),
        Sampling(temperature=1.0, repetition_penalty=0.5),
    ],
)
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_tokens_come_as_often_as_transformers_has_them(options: Sampling, spread: float) -> None:
    logits = scores(1, spread)
    processors = [
        (RepetitionPenaltyLogitsProcessor, options.repetition_penalty, 1.0),
        (TemperatureLogitsWarper, options.temperature, 1.0),
        (TopKLogitsWarper, options.top_k, 0),
        (TopPLogitsWarper, options.top_p, 1.0),
        (MinPLogitsWarper, options.min_p, 0.0),
    ]
    expected = torch.from_numpy(logits.copy())[None]
    for kind, value, off in processors:
        if value != off:
            expected = kind(value)(torch.tensor([PROMPT]), expected)
    chances = expected.softmax(-1)[0].double().numpy()
    found = drawn(options, logits)
    assert not found[chances == 0].any(), "a token that was cut off was drawn"
    # three thousand draws: five standard deviations of each of the likeliest tokens
    likely = chances.argsort()[::-1][:20]
    bound = 5 * np.sqrt(chances[likely] * (1 - chances[likely]) / 3000) + 1e-3
    assert (np.abs(found[likely] - chances[likely]) <= bound).all()


def test_greedy_is_the_largest() -> None:
    assert Sampler(TokenRequest(PROMPT, 1)).draw(scores(4))[0] == scores(4).argmax()


def test_presence_and_frequency_count_the_answer_alone() -> None:
    logits = np.zeros(VOCABULARY, np.float32)
    logits[[5, 9]] = (3.0, 2.0)
    sampler = Sampler(TokenRequest(PROMPT, 9, Sampling(presence_penalty=0.4, frequency_penalty=0.5)))
    # token 5 has 3.0, 2.1, 1.6, 1.1 and token 9 has 2.0, 1.1
    assert [sampler.draw(logits)[0] for _ in range(4)] == [5, 5, 9, 5]


def test_bias_forces_and_forbids() -> None:
    logits = scores(2)
    best = int(logits.argmax())
    assert Sampler(TokenRequest(PROMPT, 1, Sampling(logit_bias={7: 100.0}))).draw(logits)[0] == 7
    assert Sampler(TokenRequest(PROMPT, 1, Sampling(logit_bias={best: -100.0}))).draw(logits)[0] != best
    assert logits.argmax() == best, "the caller's logits are left alone"


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_is_kept(service: QwenService, temperature: float) -> None:
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA), defaults={"whitespace_flexible": False})
    config = GenerationConfig(max_new_tokens=200, temperature=temperature, grammar=grammar)
    answers = service.generate_batch(["a", "b", "c"], config)
    for answer in answers:
        told = json.loads(answer.text)
        assert set(told) == {"name", "age"}
        assert isinstance(told["age"], int)
        assert answer.finish_reason == "stop"


def test_the_words_of_a_regular_expression(service: QwenService) -> None:
    config = GenerationConfig(grammar="start: /[0-9]{3}-[xyz]/", temperature=1.0)
    text = service.generate("hello", config).text
    assert len(text) == 5
    assert text[:3].isdigit()
    assert text[3:] in {"-x", "-y", "-z"}
