"""Log probabilities of prompts, against the logits of PyTorch at every position."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from qwen_onnx.errors import PromptTooLongError, RequestError
from qwen_onnx.runtime.engines.batch import BatchEngine
from qwen_onnx.runtime.engines.batch.head import POSITIONS, with_positions
from qwen_onnx.runtime.engines.batch.model import BatchModel
from qwen_onnx.runtime.engines.batch.rewritten import rewritten
from qwen_onnx.runtime.engines.batch.steps import PREFILL_CHUNK
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.sampling import Sampling
from qwen_onnx.runtime.engines.serial import SerialEngine
from tests.runtime.engines.batch.test_engine import Heard, endless

LENGTHS = (1, 2, PREFILL_CHUNK, PREFILL_CHUNK + 1, 3 * PREFILL_CHUNK + 5)


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> Callable[[Sequence[int]], np.ndarray]:
    """Log probabilities [tokens, vocabulary] after each token, by PyTorch."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()

    def found(ids: Sequence[int]) -> np.ndarray:
        with torch.inference_mode():
            logits = model(torch.tensor([list(ids)])).logits[0].double()
        return torch.log_softmax(logits, -1).numpy()

    return found


@pytest.fixture(scope="module", params=["exact_artifact", "pruned_artifact"])
def engine(request: pytest.FixtureRequest) -> Iterator[BatchEngine]:
    """Three streams, of a graph that has the logits of all positions and of one that has the last."""
    running = BatchEngine(request.getfixturevalue(request.param), streams=3, queue_size=8, capacity=1024, threads=1)
    yield running
    running.close()


def ids_of(seed: int, count: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(2, 256) for _ in range(count))


def scored(one: Heard) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    return [told for event in one.all for told in event.prompt]


@pytest.mark.parametrize("length", LENGTHS)
def test_every_token_of_a_prompt_has_the_log_probability_of_pytorch(
    length: int, engine: BatchEngine, expected: Callable[[Sequence[int]], np.ndarray]
) -> None:
    ids = ids_of(length, length)
    one = Heard(engine, TokenRequest(ids, 0, logprobs=3, echo=True))
    assert one.end().finish == "length"
    assert not one.tokens_so_far()
    rows, told = expected(ids), scored(one)
    assert len(told) == length - 1
    for (logprob, top), row, token in zip(told, rows, ids[1:], strict=False):
        assert logprob == pytest.approx(row[token], abs=1e-4)
        assert [other for other, _ in top] == list(np.argsort(-row, kind="stable")[:3])
        assert [value for _, value in top] == pytest.approx(sorted(row)[::-1][:3], abs=1e-4)


def test_an_answer_follows_as_it_would_without(engine: BatchEngine) -> None:
    ids = ids_of(9, 150)
    plain = Heard(engine, endless(ids, 12, logprobs=2))
    plain.end()
    one = Heard(engine, endless(ids, 12, logprobs=2, echo=True))
    assert one.tokens() == plain.tokens_so_far()
    assert len(scored(one)) == 149
    assert one.all[-1].cached_tokens == 0, "cached tokens would tell no log probability"


def test_prompts_are_scored_alike_whoever_else_runs(engine: BatchEngine) -> None:
    ids = ids_of(4, 200)
    request = TokenRequest(ids, 0, Sampling(seed=1), logprobs=1, echo=True)
    alone = Heard(engine, request)
    alone.end()
    others = [Heard(engine, endless(ids_of(index, 30), 300)) for index in range(2)]
    others[0].next()
    together = Heard(engine, request)
    together.end()
    assert scored(together) == scored(alone)
    for other in others:
        other.handle.cancel()
        other.end()


def test_a_scored_prompt_can_be_cancelled_between_two_pieces(engine: BatchEngine) -> None:
    one = Heard(engine, TokenRequest(ids_of(5, 1000), 0, logprobs=0, echo=True))
    assert one.next().prompt
    one.handle.cancel()
    assert one.end().finish == "cancelled"
    assert len(scored(one)) < 999


def test_the_eos_that_ends_an_echoed_answer_is_told(engine: BatchEngine) -> None:
    """lm-eval drops the last log probability, which must be the answer's and not the prompt's."""
    ends = Sampling(logit_bias={1: 100.0})
    end = Heard(engine, TokenRequest((7, 8, 9), 5, ends, logprobs=1, echo=True)).end()
    assert (end.finish, end.token) == ("stop", 1)
    assert end.logprob is not None
    assert end.logprob < 0
    assert Heard(engine, TokenRequest((7, 8, 9), 5, ends, logprobs=1)).end().token is None


def test_no_more_than_a_piece_of_logits_is_held(exact_artifact: Path) -> None:
    model = BatchModel(exact_artifact, rows=2, capacity=256, chunk=16, threads=1)
    found = model.every_position(0, np.arange(2, 18), 0)
    assert found.shape == (16, model.vocab_size)
    assert found.base is not None, "a view of the one buffer"
    with pytest.raises(ValueError, match="reshape"):
        model.every_position(0, np.arange(2, 20), 0)


def test_an_opened_head_gives_what_the_pruned_one_gave(pruned_artifact: Path, exact_artifact: Path) -> None:
    assert rewritten(exact_artifact / "model.onnx", [with_positions]) is None
    graph = onnx.load_from_string(rewritten(pruned_artifact / "model.onnx", [with_positions]) or b"")
    assert POSITIONS in {entry.name for entry in graph.graph.input}
    opened, whole = (BatchModel(folder, rows=2, capacity=64, threads=1) for folder in (pruned_artifact, exact_artifact))
    tokens = np.array([[5, 6, 7, 8]])
    assert np.allclose(opened.extend(0, tokens, [0]), whole.extend(0, tokens, [0]), atol=1e-5)


def test_a_graph_that_is_too_large_to_open_tells_no_prompt(
    pruned_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_onnx.runtime.engines.batch.rewritten.MOST_BYTES", 10)
    engine = BatchEngine(pruned_artifact, streams=1, capacity=256, threads=1)
    assert "echo" not in engine.features
    with pytest.raises(RequestError, match="echo"):
        engine.submit(TokenRequest((5, 6), 0, logprobs=0, echo=True), lambda _: None)
    assert len(Heard(engine, endless((5, 6), 3)).tokens()) == 3
    engine.close()


def test_genai_tells_no_prompt(pruned_artifact: Path) -> None:
    engine = SerialEngine(pruned_artifact, threads=1)
    with pytest.raises(RequestError, match="echo"):
        engine.submit(TokenRequest((5, 6), 0, echo=True), lambda _: None)
    engine.close()


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (TokenRequest((5, 6), 0), RequestError),
        (TokenRequest((5, 6), -1, logprobs=0, echo=True), RequestError),
        (TokenRequest((), 0, logprobs=0, echo=True), RequestError),
        (TokenRequest((5,) * 1025, 0, logprobs=0, echo=True), PromptTooLongError),
    ],
)
def test_what_cannot_be_scored_is_refused(request_: TokenRequest, error: type[Exception], engine: BatchEngine) -> None:
    with pytest.raises(error):
        engine.submit(request_, lambda _: None)


def test_a_prompt_may_fill_the_context(engine: BatchEngine) -> None:
    one = Heard(engine, TokenRequest(ids_of(3, 1024), 0, logprobs=0, echo=True))
    assert one.end().finish == "length"
    assert len(scored(one)) == 1023
