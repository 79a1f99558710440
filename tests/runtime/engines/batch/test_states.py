"""Linear attention in rows of a batch: its states cannot be cut, and each answer is that of a lone run all the same."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_onnx.artifact.genai_config import GENAI_CONFIG
from qwen_onnx.errors import ArtifactError
from qwen_onnx.runtime import Engine
from qwen_onnx.runtime.engines.batch import BatchEngine
from qwen_onnx.runtime.engines.batch.layout import UnsupportedGraphError
from qwen_onnx.runtime.engines.batch.speculation import Costs, Speculator
from qwen_onnx.runtime.engines.batch.states import COPIES
from qwen_onnx.runtime.engines.batch.steps import PREFILL_CHUNK
from qwen_onnx.runtime.engines.loading import EngineOptions, load_engine
from qwen_onnx.runtime.engines.sampling import Sampling
from tests.conftest import rewrite_json
from tests.runtime.engines.batch.test_engine import Heard, alone, assert_each_as_alone, endless

STREAMS = 3


@pytest.fixture(scope="module")
def reference(hybrid_artifact: Path) -> Engine:
    return Engine(hybrid_artifact, threads=1)


@pytest.fixture
def engine(hybrid_artifact: Path) -> Iterator[BatchEngine]:
    running = BatchEngine(hybrid_artifact, streams=STREAMS, queue_size=64, capacity=1024, threads=1)
    yield running
    running.close()


def told(seed: int, count: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(2, 256) for _ in range(count))


@pytest.mark.parametrize("seed", range(3))
def test_whoever_joins_and_leaves_when_each_answer_is_that_of_a_lone_run(
    seed: int, engine: BatchEngine, reference: Engine
) -> None:
    assert_each_as_alone(engine, reference, seed)


def cached(engine: BatchEngine, reference: Engine, ids: tuple[int, ...], count: int = 8) -> int:
    """Tokens of a prompt that needed no computing; its answer is that of a lone run."""
    request = endless(ids, count)
    one = Heard(engine, request)
    assert one.tokens() == alone(reference, request)
    return one.all[-1].cached_tokens


def test_a_conversation_goes_on_where_its_answer_ended(engine: BatchEngine, reference: Engine) -> None:
    first = told(0, 100)
    answer = tuple(alone(reference, endless(first, 8)))
    assert cached(engine, reference, first) == 0
    # the last token of the answer was never put in
    assert cached(engine, reference, (*first, *answer, *told(1, 30))) == len(first) + len(answer) - 1


def test_a_turn_whose_template_changes_the_end_goes_on_from_a_copy(engine: BatchEngine, reference: Engine) -> None:
    first = told(0, 100)
    assert cached(engine, reference, first) == 0
    assert cached(engine, reference, (*first[:95], *told(1, 60))) == PREFILL_CHUNK


def test_prompts_that_share_a_beginning_go_on_behind_all_of_it(engine: BatchEngine, reference: Engine) -> None:
    """The first that differs shows where; from then on a copy is there, also for a row that never read it."""
    system = told(0, 150)
    assert cached(engine, reference, (*system, *told(1, 90))) == 0
    assert cached(engine, reference, (*system, *told(2, 90))) == 0
    assert cached(engine, reference, (*system, *told(3, 90))) == len(system)
    # two at once: one of them has another row
    heard = [Heard(engine, endless((*system, *told(4 + index, 70)), 30)) for index in range(2)]
    for index, one in enumerate(heard):
        assert one.tokens() == alone(reference, endless((*system, *told(4 + index, 70)), 30))
        assert one.all[-1].cached_tokens == len(system)


def test_nobody_finds_the_states_of_another_key(engine: BatchEngine) -> None:
    ids = told(0, 150)
    for scope in ("one", "other"):
        one = Heard(engine, endless(ids, 4, cache_scope=scope))
        one.end()
        assert one.all[-1].cached_tokens == 0


def test_copies_are_few(engine: BatchEngine) -> None:
    for index in range(4 * COPIES):
        Heard(engine, endless(told(index, 130), 2)).end()
    states = engine._model.states
    assert states is not None
    assert 0 < len(states._copies) <= COPIES * STREAMS


class Oracle(Speculator):
    """Guesses of any length that are mostly right."""

    def __init__(self, prompt: tuple[int, ...], answer: list[int]) -> None:
        super().__init__(prompt, Costs(), again=True)
        self._rest, self._random = list(answer), random.Random(len(prompt))

    def propose(self, most: int) -> list[int]:
        guess = self._rest[: min(most, self._random.randrange(8))]
        return [token if self._random.random() < 0.8 else (token + 1) % 256 for token in guess]

    def hear(self, token: int) -> None:
        super().hear(token)
        assert token == self._rest.pop(0)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5, seed=3)])
def test_wrong_guesses_leave_nothing_behind(
    sampling: Sampling, hybrid_artifact: Path, engine: BatchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = BatchEngine(hybrid_artifact, streams=1, capacity=1024, threads=1, speculate="off")
    for seed in range(3):
        request = endless(told(seed, 20 + 60 * seed), 80, sampling=sampling)
        answer = Heard(plain, request).tokens()
        with monkeypatch.context() as patched:
            patched.setattr(engine, "_speculator", lambda asked, answer=answer: Oracle(asked.prompt_ids, answer))
            assert Heard(engine, request).tokens() == answer
        # what such an answer left is a prefix like any other
        after = endless((*request.prompt_ids, *answer[:50], 9), 10)
        assert Heard(engine, after).tokens() == Heard(plain, after).tokens()
    plain.close()
    engine.close()
    stats = engine.stats()
    assert stats.drafted_tokens > stats.accepted_tokens > 0


def test_an_int8_cache_and_a_graph_of_unknown_states_are_refused(hybrid_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="an int8 KV cache is served in batches alone"):
        load_engine(hybrid_artifact, EngineOptions(kv_cache="int8"))
    folder = Path(shutil.copytree(hybrid_artifact, tmp_path / "unknown"))
    found = json.loads((folder / GENAI_CONFIG).read_text())
    del found["model"]["decoder"]["inputs"]["past_conv_names"]
    rewrite_json(folder / GENAI_CONFIG, model=found["model"])
    with pytest.raises(UnsupportedGraphError, match="keeps other state"):
        BatchEngine(folder)
