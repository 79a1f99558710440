"""Tokens that a head for multi-token prediction guesses: every answer is that of plain steps, right or wrong."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qwen_onnx.artifact.draft_head import DRAFT_HEAD, NEXT
from qwen_onnx.errors import ArtifactError
from qwen_onnx.runtime import Engine
from qwen_onnx.runtime.engines.batch import BatchEngine, ends
from qwen_onnx.runtime.engines.batch.draft_head import WINDOW, Ahead
from qwen_onnx.runtime.engines.batch.model import BatchModel
from qwen_onnx.runtime.engines.batch.speculation import ALLOWANCE, TRUST, Costs, Speculator
from qwen_onnx.runtime.engines.sampling import Sampling
from tests.runtime.engines.batch.test_engine import Heard, assert_each_as_alone, endless
from tests.runtime.engines.batch.test_speculation import figures
from tests.runtime.engines.batch.test_states import told


def opened(folder: Path, speculate: Any = "auto", streams: int = 3) -> BatchEngine:
    return BatchEngine(folder, streams=streams, queue_size=64, capacity=1024, threads=1, speculate=speculate)


@pytest.fixture(autouse=True)
def steps_cost_what_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Costs, "note", lambda *_: None)


@pytest.fixture(scope="module")
def plain(drafting_artifact: Path) -> Iterator[BatchEngine]:
    running = opened(drafting_artifact, "off")
    yield running
    running.close()


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.7, seed=5), Sampling(repetition_penalty=1.3)], ids=str
)
def test_right_and_wrong_guesses_give_the_answer_of_plain_steps(
    sampling: Sampling, drafting_artifact: Path, plain: BatchEngine
) -> None:
    engine = opened(drafting_artifact)
    for seed in range(4):
        request = endless(told(seed, 20 + 60 * seed), 60, sampling=sampling)
        assert Heard(engine, request).tokens() == Heard(plain, request).tokens()
    drafted, right = figures(engine)
    assert drafted > 0
    if sampling == Sampling():
        assert 0.3 < right / drafted < 1


def test_nothing_is_guessed_where_it_is_off_and_the_head_is_not_loaded(drafting_artifact: Path) -> None:
    for speculate in ("off", "ngram"):
        model = BatchModel(drafting_artifact, rows=1, capacity=64, threads=1)
        assert model.draft_head is None
        engine = opened(drafting_artifact, speculate)
        Heard(engine, endless(told(1, 30), 8)).end()
        assert figures(engine)[0] == 0


def test_a_head_that_is_never_right_is_asked_now_and_then(hybrid_artifact: Path) -> None:
    engine, plain = opened(hybrid_artifact), opened(hybrid_artifact, "off")
    request = endless(told(3, 40), 300)
    assert Heard(engine, request).tokens() == Heard(plain, request).tokens()
    drafted, right = figures(engine)
    assert right <= drafted <= 30
    plain.close()


@pytest.mark.parametrize("seed", range(2))
def test_in_company_each_answer_is_that_of_a_lone_run(seed: int, drafting_artifact: Path) -> None:
    engine = opened(drafting_artifact)
    assert_each_as_alone(engine, Engine(drafting_artifact, threads=1), seed)
    engine.close()


def test_the_head_reads_what_the_model_has_read(drafting_artifact: Path) -> None:
    """In pieces it gives the states that it gives at once, and its guess is what the model says next."""
    model = BatchModel(drafting_artifact, rows=1, capacity=128, threads=1, drafts=True)
    head, ids = model.draft_head, np.array(told(5, 40))
    assert head is not None
    model.extend(0, ids[None], [0])
    hidden = model.hidden[0].copy()
    whole = head.step(ids[1:].tolist(), hidden[:-1], head.cache(64), 0)
    cache = head.cache(64)
    parts = [head.step(ids[1 + at : 14 + at].tolist(), hidden[at : at + 13], cache, at) for at in (0, 13, 26)]
    assert np.allclose(np.concatenate(parts), whole, atol=1e-5)


def test_rows_of_the_head_are_those_of_the_model(drafting_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in int4, whose codes, scales and zero points are cut."""
    for common in (1 << 16, 100):
        monkeypatch.setattr(ends, "COMMON", common)
        model = BatchModel(drafting_artifact, rows=1, capacity=64, threads=1, drafts=True)
        assert model.draft_head is not None
        for seed in range(8):
            model.resume(0, 0)
            logits = model.extend(0, np.array([told(seed, 12)]), [0])[0]
            assert model.draft_head.likeliest(model.hidden[0, -1]) == logits[:common].argmax()


def test_what_an_answer_remembers_is_bounded_and_gaps_are_forgotten(drafting_artifact: Path) -> None:
    model = BatchModel(drafting_artifact, rows=1, capacity=256, threads=1, drafts=True)
    assert model.draft_head is not None
    text, width = list(told(6, 200)), model.draft_head.width
    states = np.random.default_rng(0).normal(size=(200, width)).astype(np.float32)
    ahead = Ahead(model.draft_head, most=100)
    ahead.saw(0, states[:64])
    ahead.saw(64, states[64:100])
    assert len(ahead._states) == WINDOW
    assert ahead.guess(text[:100], 2) == []  # the last state is one too far
    assert len(ahead.guess(text[:101], 2)) == 2
    assert ahead._states == []
    ahead.saw(98, states[98:103])  # two of them are known
    assert len(ahead._states) == 3
    assert len(ahead.guess(text[:104], 1)) == 1
    ahead.saw(110, states[110:111])
    assert len(ahead._states) == 1
    assert ahead._read == 0
    # behind a picture: embeddings of its tokens are not the table's
    seeing = Ahead(model.draft_head, most=100, unread={text[20]})
    seeing.saw(0, states[:25])
    assert len(seeing.guess(text[:26], 1)) == 1
    assert seeing._read == 25 - max(at for at in range(26) if text[at] == text[20])


def test_a_speculator_learns_how_often_the_head_is_right(drafting_artifact: Path) -> None:
    model = BatchModel(drafting_artifact, rows=1, capacity=256, threads=1, drafts=True)
    assert model.draft_head is not None
    costs = Costs()
    ids = told(7, 30)
    model.extend(0, np.array([ids]), [0])
    speculator = Speculator(ids, costs, ahead=Ahead(model.draft_head, 50))
    speculator.saw(0, model.hidden[0])
    speculator.hear(9)
    assert speculator.propose(10)
    assert speculator.settle(1, 0) > costs.of(2)
    assert costs.trust[0] < TRUST[0]
    assert costs.trust[1] == TRUST[1]
    # what it has in hand is spent, and the head is not asked
    assert speculator._in_hand < ALLOWANCE
    assert speculator.propose(10) == []


def damaged(source: Path, folder: Path, change: Any) -> Path:
    copy = Path(shutil.copytree(source, folder))
    change(copy / DRAFT_HEAD)
    return copy


def test_a_head_that_is_not_this_models_is_refused(drafting_artifact: Path, tmp_path: Path) -> None:
    def other_output(file: Path) -> None:
        model = onnx.load(str(file), load_external_data=False)
        for node in model.graph.node:
            node.output[:] = ["other" if name == NEXT else name for name in node.output]
        next(item for item in model.graph.output if item.name == NEXT).name = "other"
        onnx.save(model, str(file))

    changes = {
        "cut": lambda file: file.write_bytes(file.read_bytes()[:100]),
        "decoder": lambda file: shutil.copyfile(file.parent / "model.onnx", file),
        "output": other_output,
        "data": lambda file: file.with_name(f"{DRAFT_HEAD}.data").unlink(),
    }
    for name, change in changes.items():
        folder = damaged(drafting_artifact, tmp_path / name, change)
        with pytest.raises(ArtifactError, match=r"head for multi-token prediction|is not the head of this model"):
            opened(folder)
        opened(folder, "ngram").close()
