"""Continuous batching against onnxruntime-genai: whoever joins or leaves when, each answer is that of a lone run."""

from __future__ import annotations

import queue
import random
import time
from pathlib import Path

import numpy as np
import pytest

from qwen_onnx.errors import OverloadedError, PromptTooLongError, RequestError, ServiceError
from qwen_onnx.runtime import Engine
from qwen_onnx.runtime.engines.batch import BatchEngine
from qwen_onnx.runtime.engines.interface import TokenEngine, TokenEvent, TokenRequest
from qwen_onnx.runtime.engines.sampling import Sampling


class Heard:
    """Collects what an engine says of one request."""

    def __init__(self, engine: TokenEngine, request: TokenRequest) -> None:
        self.events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        self.handle = engine.submit(request, self.events.put)
        self.all: list[TokenEvent] = []

    def next(self) -> TokenEvent:
        self.all.append(self.events.get(timeout=60))
        return self.all[-1]

    def end(self) -> TokenEvent:
        while not (event := self.next()).last:
            pass
        return event

    def tokens(self) -> list[int]:
        self.end()
        return self.tokens_so_far()

    def tokens_so_far(self) -> list[int]:
        return [event.token for event in self.all if event.token is not None]


def prompt(rng: random.Random, most: int = 200) -> tuple[int, ...]:
    return tuple(rng.randrange(2, 256) for _ in range(rng.randrange(1, most)))


def alone(reference: Engine, request: TokenRequest) -> list[int]:
    count = request.max_new_tokens
    return list(reference.generate(request.prompt_ids, max_new_tokens=count, stop_on_eos=request.stop_on_eos))


def endless(ids: tuple[int, ...], count: int, **options: object) -> TokenRequest:
    return TokenRequest(ids, count, stop_on_eos=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
def test_whoever_joins_and_leaves_when_each_answer_is_that_of_a_lone_run(
    seed: int, exact_artifact: Path, reference: Engine
) -> None:
    engine = BatchEngine(exact_artifact, streams=3, queue_size=64, capacity=1024, threads=1)
    assert_each_as_alone(engine, reference, seed)
    assert engine.stats().running == engine.stats().waiting == 0
    engine.close()


def assert_each_as_alone(engine: BatchEngine, reference: Engine, seed: int) -> None:
    """Requests that come at any time, many with one of two beginnings, and some of which are cancelled."""
    rng = random.Random(seed)
    beginnings = [prompt(rng), prompt(rng)]
    heard = []
    for _ in range(14):
        ids = (rng.choice(beginnings) if rng.random() < 0.5 else ()) + prompt(rng)
        request = endless(ids, rng.randrange(1, 60))
        heard.append((request, Heard(engine, request), rng.random() < 0.25))
        time.sleep(rng.random() * 0.02)
        for _, one, cancelled in heard:
            if cancelled and rng.random() < 0.5:
                one.handle.cancel()
    for request, one, cancelled in heard:
        tokens = one.tokens()
        expected = alone(reference, request)
        assert tokens == expected[: len(tokens)]
        assert cancelled or len(tokens) == len(expected)


def test_a_late_request_joins_and_finishes_while_others_run(engine: BatchEngine) -> None:
    long = [Heard(engine, endless((5 + index,) * 20, 800)) for index in range(2)]
    for one in long:
        one.next()
    late = Heard(engine, endless((9,) * 10, 5))
    assert late.end().finish == "length"
    assert all(one.events.qsize() + len(one.all) < 700 for one in long), "they had finished before"
    for one in long:
        assert one.end().finish == "length"


def test_a_short_prompt_does_not_wait_behind_a_long_one(engine: BatchEngine) -> None:
    long = Heard(engine, endless((7,) * 1000, 2))
    short = Heard(engine, endless((8,) * 10, 2))
    short.next()
    assert long.events.empty()
    long.end()


def test_eos_ends_and_is_not_told(engine: BatchEngine, reference: Engine) -> None:
    free = alone(reference, endless((7, 8, 9), 40))
    bias = {1: 100.0}
    ended = Heard(engine, TokenRequest((7, 8, 9), 40, Sampling(logit_bias=bias)))
    assert (ended.end().finish, len(ended.all)) == ("stop", 1)
    assert Heard(engine, endless((7, 8, 9), 40, sampling=Sampling(logit_bias=bias))).tokens() == free


def test_what_is_known_of_a_prompt_is_not_computed_again(engine: BatchEngine, reference: Engine) -> None:
    system = tuple(range(2, 252))
    requests = [endless((*system, *tail), 8) for tail in ((3, 4), (5, 6, 7), (5, 6, 7))]
    cached = []
    for request in requests:
        one = Heard(engine, request)
        assert one.tokens() == alone(reference, request)
        cached.append(one.all[-1].cached_tokens)
    assert cached == [0, len(system), len(system) + 2], "the last token of a prompt is always computed"
    assert engine.stats().cached_tokens == sum(cached)


def test_prompts_that_come_together_share_their_beginning(engine: BatchEngine, reference: Engine) -> None:
    system = tuple(range(2, 252))
    requests = [endless((*system, tail), 8) for tail in (3, 4, 5)]
    heard = [Heard(engine, request) for request in requests]
    for request, one in zip(requests, heard, strict=True):
        assert one.tokens() == alone(reference, request)
    assert engine.stats().prompt_tokens < 2 * len(system)


def test_seeds_are_kept_under_load_and_after_it(tiny_artifact: Path) -> None:
    """On int4, where the rounding of a row depends on its neighbours."""
    engine = BatchEngine(tiny_artifact, streams=4, queue_size=8, capacity=1024, threads=1)
    request = endless(tuple(range(2, 150)), 60, sampling=Sampling(temperature=1.0, seed=11))
    other = endless(tuple(range(2, 150)), 60, sampling=Sampling(temperature=1.0, seed=12))
    quiet = Heard(engine, request).tokens()
    load = [Heard(engine, endless((*range(2, 100), index), 300)) for index in range(2, 5)]
    busy = Heard(engine, request).tokens()
    assert busy == quiet
    assert Heard(engine, other).tokens() != quiet
    for one in load:
        one.end()
    engine.close()


def test_a_cancelled_request_frees_its_stream_within_a_step(engine: BatchEngine) -> None:
    running = [Heard(engine, endless((index,) * 5, 900)) for index in (3, 4, 5)]
    for one in running:
        one.next()
    waiting = Heard(engine, endless((6,), 3))
    running[1].handle.cancel()
    assert running[1].end().finish == "cancelled"
    assert waiting.end().finish == "length"
    assert engine.stats().running == 2


def test_more_than_may_wait_is_refused_and_recovers(engine: BatchEngine) -> None:
    held = [Heard(engine, endless((3, 4), 900)) for _ in range(5)]
    with pytest.raises(OverloadedError, match="2 requests wait"):
        engine.submit(endless((3,), 1), lambda _: None)
    for one in held:
        one.handle.cancel()
    for one in held:
        one.end()
    assert Heard(engine, endless((3,), 2)).end().finish == "length"


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (TokenRequest((), 1), RequestError),
        (TokenRequest((256 * 9,), 1), RequestError),
        (TokenRequest((5,) * 1000, 100), PromptTooLongError),
        (TokenRequest((5,), 1, grammar="start: ["), RequestError),
        (TokenRequest((5,), 1, grammar='{"grammars": 5}'), RequestError),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(
    engine: BatchEngine, request_: TokenRequest, error: type[Exception]
) -> None:
    with pytest.raises(error):
        engine.submit(request_, lambda _: None)


def test_log_probabilities_are_those_of_the_model(engine: BatchEngine, reference: Engine) -> None:
    ids = tuple(range(60, 120))
    one = Heard(engine, endless(ids, 6, sampling=Sampling(temperature=1.5, top_k=50, seed=3), logprobs=4))
    tokens = one.tokens()
    logits = reference.forced_logits(ids, tokens)[: len(tokens)].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for event, row in zip(one.all, expected, strict=False):
        assert event.logprob == pytest.approx(row[event.token], abs=1e-4)
        assert [token for token, _ in event.top] == list(np.argsort(-row, kind="stable")[:4])
        assert [value for _, value in event.top] == pytest.approx(sorted(row)[::-1][:4], abs=1e-4)


def test_an_engine_that_is_closed_says_so(exact_artifact: Path) -> None:
    engine = BatchEngine(exact_artifact, streams=1, capacity=256, threads=1)
    running = Heard(engine, endless((5,), 200))
    running.next()
    engine.close()
    assert isinstance(running.end().error, ServiceError), "nobody must take it for a finished answer"
    with pytest.raises(ServiceError, match="closed"):
        engine.submit(endless((5,), 1), lambda _: None)


def test_a_prefix_of_another_scope_is_not_found(engine: BatchEngine) -> None:
    """Else whoever shares an engine can guess another's prompt: ``cached_tokens`` would tell."""
    secret = tuple(range(2, 202))

    def cached(scope: str, *tail: int) -> int:
        one = Heard(engine, endless((*secret, *tail), 4, cache_scope=scope))
        one.end()
        return one.all[-1].cached_tokens

    assert cached("alice", 3) == 0
    assert cached("bob", 3) == 0
    assert cached("", 3) == 0
    assert cached("alice", 5) == len(secret)
    # running at the same time: a row that is still in use is not copied from either
    held = Heard(engine, endless((*secret, 7), 700, cache_scope="carol"))
    held.next()
    assert cached("dave", 8) == 0
    assert cached("carol", 9) == len(secret)
    held.handle.cancel()
    held.end()
