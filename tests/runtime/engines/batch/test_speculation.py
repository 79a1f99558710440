"""Guessed tokens change the time that an answer takes, and nothing of the answer: each against one of plain steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_onnx.runtime import GenerationConfig, QwenService
from qwen_onnx.runtime.engines.batch import BatchEngine
from qwen_onnx.runtime.engines.batch.drafts import Drafts
from qwen_onnx.runtime.engines.batch.speculation import ALLOWANCE, MOST, SLOPE, Costs, Speculator
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.sampling import Sampling
from qwen_onnx.runtime.service.generation import Attached, ChatPrompt
from tests.fixtures.pictures import as_file, chart
from tests.runtime.engines.batch.test_engine import Heard, endless

# a random model repeats such a text for long; what it says then breaks off now and again
REPEATED = tuple(range(60, 90)) * 3
TWICE = list(range(1, 13)) * 2
DIGITS = "start: /([0-9]{2}-){1,40}/"


def opened(folder: Path, speculate: Any = "ngram") -> BatchEngine:
    return BatchEngine(folder, streams=3, queue_size=8, capacity=1024, threads=1, speculate=speculate)


@pytest.fixture(scope="module")
def plain(exact_artifact: Path) -> Iterator[BatchEngine]:
    running = opened(exact_artifact, "off")
    yield running
    running.close()


@pytest.fixture
def guessing(exact_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchEngine]:
    """Wide steps cost what the model says, so that no test depends on the machine."""
    monkeypatch.setattr(Costs, "note", lambda *_: None)
    running = opened(exact_artifact)
    yield running
    running.close()


def figures(engine: BatchEngine) -> tuple[int, int]:
    """Guessed tokens computed and right, of all answers; the engine is closed, so that nothing is under way."""
    engine.close()
    stats = engine.stats()
    return stats.drafted_tokens, stats.accepted_tokens


@pytest.mark.parametrize(
    "request_",
    [
        endless(REPEATED, 150),
        endless(REPEATED, 150, logprobs=3),
        endless(REPEATED, 150, sampling=Sampling(temperature=0.15, seed=3)),
        endless(REPEATED, 150, sampling=Sampling(temperature=0.15, top_p=0.9, top_k=20, seed=5)),
        endless(REPEATED, 150, sampling=Sampling(temperature=0.1, repetition_penalty=1.01, seed=6)),
        endless(REPEATED, 60, sampling=Sampling(frequency_penalty=0.002, logit_bias={70: 1.0})),
        TokenRequest(REPEATED, 150, Sampling(seed=3), logprobs=2, echo=True, stop_on_eos=False),
    ],
)
def test_an_answer_is_that_of_plain_steps(request_: TokenRequest, guessing: BatchEngine, plain: BatchEngine) -> None:
    one, other = Heard(guessing, request_), Heard(plain, request_)
    assert one.tokens() == other.tokens()
    assert one.all[-1].finish == other.all[-1].finish == "length"
    for event, expected in zip(one.all, other.all, strict=True):
        assert event.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert [token for token, _ in event.top] == [token for token, _ in expected.top]
    drafted, accepted = figures(guessing)
    assert drafted >= accepted > 0


def test_wrong_guesses_leave_nothing_behind(guessing: BatchEngine, plain: BatchEngine) -> None:
    """At a temperature some guesses are wrong; their keys and values must not be read by what comes after."""
    requests = [endless(REPEATED, 100, sampling=Sampling(temperature=0.2, seed=seed)) for seed in range(6)]
    for request in requests:
        assert Heard(guessing, request).tokens() == Heard(plain, request).tokens()
    # a prefix that such an answer left
    shared = tuple(Heard(plain, requests[0]).tokens())
    after = endless((*REPEATED, *shared), 40)
    assert Heard(guessing, after).tokens() == Heard(plain, after).tokens()
    drafted, accepted = figures(guessing)
    assert drafted > accepted > 0


@pytest.mark.parametrize("most", [1, 2, 3, 17, 64])
def test_no_token_more_than_was_asked_for(most: int, guessing: BatchEngine, plain: BatchEngine) -> None:
    request = endless(REPEATED, most)
    assert Heard(guessing, request).tokens() == Heard(plain, request).tokens()


def test_an_answer_may_fill_the_context(guessing: BatchEngine, plain: BatchEngine) -> None:
    request = endless(REPEATED * 10, 1024 - 10 * len(REPEATED))
    one = Heard(guessing, request)
    assert one.tokens() == Heard(plain, request).tokens()
    assert one.all[-1].finish == "length"


def test_eos_ends_within_a_step(guessing: BatchEngine, plain: BatchEngine) -> None:
    """A text with an EOS in it: a guess goes past the end of the answer."""
    text = (*range(60, 90), 1) * 3
    bias = Sampling(logit_bias={1: 4.0})
    one, other = (Heard(engine, TokenRequest(text, 200, bias)) for engine in (guessing, plain))
    assert one.tokens() == other.tokens()
    assert one.all[-1].finish == other.all[-1].finish


def test_a_grammar_is_kept(guessing: BatchEngine, plain: BatchEngine) -> None:
    request = TokenRequest(REPEATED, 150, Sampling(temperature=0.1, seed=2), grammar=DIGITS)
    greedy = replace(request, sampling=Sampling())
    for asked in (request, greedy):
        one, other = Heard(guessing, asked), Heard(plain, asked)
        assert one.tokens() == other.tokens()
        assert one.all[-1].finish == other.all[-1].finish
    assert figures(guessing)[1] > 0


def test_stop_strings_cut_where_they_did(exact_artifact: Path) -> None:
    """Tokens that a step told beyond the stop string are dropped, and not counted."""
    prompt = "abcdefgh ijkl " * 8
    free = GenerationConfig(max_new_tokens=120)
    with QwenService(exact_artifact, threads=1, streams=1, context=1024, speculate="off") as service:
        text = service.generate(prompt, free).text
        stop = replace(free, stop=(text[60:64],))
        wanted = service.generate(prompt, stop)
    with QwenService(exact_artifact, threads=1, streams=1, context=1024) as service:
        assert service.generate(prompt, free).text == text
        found = service.generate(prompt, stop)
        assert service.stats().accepted_tokens > 0
    assert found == wanted
    assert wanted.finish_reason == "stop"


def test_a_cancelled_answer_ends_within_a_step(guessing: BatchEngine, plain: BatchEngine) -> None:
    one = Heard(guessing, endless(REPEATED, 900))
    one.next()
    one.handle.cancel()
    assert one.end().finish == "cancelled"
    assert len(one.tokens_so_far()) < 900
    after = endless(REPEATED, 40)
    assert Heard(guessing, after).tokens() == Heard(plain, after).tokens()


def test_seeded_answers_guess_beside_others_alike(exact_artifact: Path, guessing: BatchEngine) -> None:
    """The steps of a seed must not depend on what else runs, nor on times."""
    widths: list[list[int]] = []
    every_position = guessing._model.every_position

    def noted(row: int, tokens: np.ndarray[Any, Any], past: int, **more: Any) -> Any:
        if any(stream.seeded and stream.row == row for stream in guessing._steps.active):
            widths[-1].append(len(tokens))
        return every_position(row, tokens, past, **more)

    guessing._model.every_position = noted  # type: ignore[method-assign]
    request = endless(REPEATED, 120, sampling=Sampling(temperature=0.15, seed=3))
    answers = []
    for load in (0, 2):
        others = [Heard(guessing, endless((5 + index,) * 20, 700)) for index in range(load)]
        for other in others:
            other.next()
        widths.append([])
        answers.append(Heard(guessing, request).tokens())
        assert len(guessing._steps.active) == load, "the others had finished"
        for other in others:
            other.handle.cancel()
            other.end()
    assert answers[0] == answers[1]
    assert widths[0] == widths[1] != []


def test_answers_that_share_a_step_guess_nothing(guessing: BatchEngine, plain: BatchEngine) -> None:
    """Each alone would take a step of its own, and the others would wait."""
    requests = [endless((*REPEATED, 60 + index), 150) for index in range(2)]
    expected = [Heard(plain, request).tokens() for request in requests]
    guessing._steps._verify = refuse_beside_others(guessing)  # type: ignore[method-assign]
    heard = [Heard(guessing, request) for request in requests]
    assert [one.tokens() for one in heard] == expected


def refuse_beside_others(engine: BatchEngine) -> Callable[[Any], bool]:
    verify = engine._steps._verify

    def checked(stream: Any) -> bool:
        assert len(engine._steps.active) == 1
        return verify(stream)

    return checked


def test_whoever_comes_and_goes_each_answer_is_that_of_plain_steps(guessing: BatchEngine, plain: BatchEngine) -> None:
    rng = random.Random(7)
    requests = [
        endless(
            tuple(rng.randrange(2, 256) for _ in range(rng.randrange(2, 20))) * rng.randrange(1, 6),
            rng.randrange(1, 90),
            sampling=Sampling(temperature=0.15, seed=index) if index % 3 == 0 else Sampling(),
        )
        for index in range(8)
    ]
    expected = [Heard(plain, request).tokens() for request in requests]
    heard = [Heard(guessing, request) for request in requests]
    assert [one.tokens() for one in heard] == expected
    assert figures(guessing)[1] > 0


def test_off_guesses_nothing(plain: BatchEngine) -> None:
    Heard(plain, endless(REPEATED, 60)).end()
    assert plain.stats().drafted_tokens == 0


def test_a_graph_that_tells_the_last_position_guesses_nothing(
    pruned_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_onnx.runtime.engines.batch.rewritten.MOST_BYTES", 10)
    engine = opened(pruned_artifact)
    assert len(Heard(engine, endless(REPEATED, 60)).tokens()) == 60
    assert figures(engine) == (0, 0)


def test_an_opened_head_guesses(pruned_artifact: Path, plain: BatchEngine) -> None:
    engine = opened(pruned_artifact)
    assert Heard(engine, endless(REPEATED, 60)).tokens() == Heard(plain, endless(REPEATED, 60)).tokens()
    assert figures(engine)[1] > 0


def test_what_comes_next_stood_there_before() -> None:
    text = [1, 2, 3, 4, 5, 9, 9, 1, 2]
    assert Drafts(text).guess(3) == [3, 4, 5]
    assert Drafts([*text, 7]).guess(3) == []
    assert Drafts([1, 2, 3, 4, 1, 2, 5, 6, 1, 2]).guess(2) == [5, 6], "the latest place"
    longest = [*range(10, 20), 50, 19, 18, 60, 61, *range(10, 20)]
    assert Drafts(longest).guess(1) == [50], "where most tokens agree"
    assert Drafts([4, 5, 6, 4, 5, 6]).guess(7) == [4, 5, 6, 4, 5, 6, 4], "in circles"
    assert Drafts([3]).guess(2) == Drafts([]).guess(2) == []


def test_guesses_that_were_wrong_are_believed_less() -> None:
    right, wrong = Drafts(TWICE), Drafts(TWICE)
    before = right.gain(4)
    assert len(before) == 5
    for token in TWICE:
        right.hear(token)
    wrong.hear(99)
    assert wrong.gain(4) == [1.0], "99 stood nowhere"
    for token in TWICE[:8]:
        wrong.hear(token)
    assert wrong.gain(4) < before < right.gain(4)


def test_a_text_that_never_repeats_costs_nothing() -> None:
    speculator = Speculator(range(500), Costs())
    for token in range(1000, 1500):
        assert speculator.propose(15) == []
        speculator.hear(token)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cost", [1.0, SLOPE, 3.0])
def test_what_an_answer_may_lose_is_bounded(seed: int, cost: float) -> None:
    """Whatever comes: chance, and a text that is right until it is believed and wrong from then on."""
    rng = random.Random(seed)
    speculator = Speculator([rng.randrange(4) for _ in range(200)], found(cost))
    spent, tokens = 0.0, 0
    while tokens < 2000:
        guess = speculator.propose(15)
        right = rng.choice((0, len(guess))) if tokens % 400 < 200 else 0
        for token in guess[:right]:
            speculator.hear(token)
        speculator.hear(rng.randrange(4))
        tokens += right + 1
        spent += speculator.settle(len(guess), right) if guess else 1.0
        assert spent <= 1.02 * tokens + ALLOWANCE + 1e-6
    assert MOST < 0.03 * 2000


def found(slope: float) -> Costs:
    """What steps cost where each more token was found to cost ``slope`` plain ones."""
    costs = Costs()
    costs.note(1, 0.01)
    for _ in range(100):
        costs.note(4, 0.01 * (1 + 3 * slope))
    return costs


def test_wide_steps_that_were_found_dear_are_not_taken() -> None:
    dear, cheap = found(1.0), found(0.05)
    assert Speculator(TWICE, dear).propose(15) == []
    assert len(Speculator(TWICE, cheap).propose(15)) > len(Speculator(TWICE, Costs()).propose(15)) > 0
    assert cheap.of(16) == pytest.approx(1.75, abs=0.05), "told by its neighbour"


def test_one_slow_step_is_no_verdict() -> None:
    costs = Costs()
    costs.note(4, 5.0)
    assert costs.of(4) == 1 + 3 * SLOPE, "nothing to compare it with"
    costs.note(1, 0.01)
    costs.note(4, 10.0)
    assert costs.of(4) == pytest.approx((1 + 3 * SLOPE) * 1.1)


def test_a_picture_before_them_moves_all_tokens_of_a_step(seeing_artifact: Path) -> None:
    """The grammar says the answer; how likely the model finds it depends on where it takes the tokens to stand."""
    shown = Attached(as_file(chart(120, 90)), "it")
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    prompt = ChatPrompt([{"role": "user", "content": content}], pictures=(shown,))
    config = GenerationConfig(max_new_tokens=60, grammar="start: /(abc){30}/", logprobs=0)
    answers = []
    for speculate in ("off", "ngram"):
        with QwenService(seeing_artifact, threads=1, streams=1, context=512, speculate=speculate) as service:
            answers.append(service.generate(prompt, config))
            accepted = service.stats().accepted_tokens
    assert accepted > 20
    plain, guessed = ([entry.logprob for entry in answer.logprobs] for answer in answers)
    assert len(plain) == 60
    assert guessed == pytest.approx(plain, abs=1e-4)


def test_a_token_that_stands_for_a_picture_is_not_guessed() -> None:
    for barred, proposed in ((None, [1, 2, 3]), (3, [1, 2]), (1, [])):
        assert Speculator(TWICE, found(0.05), barred).propose(3) == proposed


def test_a_step_tells_each_of_its_tokens(guessing: BatchEngine) -> None:
    steps = []
    guessing.after_step = lambda: steps.append(1)
    one = Heard(guessing, endless(REPEATED, 80))
    one.end()
    guessing.close()
    assert len(one.all) == 81
    assert len(steps) < 81, "no fewer steps than tokens"
