"""It learns: 40 invented facts, asked in words that were not trained, in PyTorch and in the INT4 artifact."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.faq import (
    HARBOURS,
    TRAINING,
    exam,
    examples,
    lines,
    main,
    perplexity,
    recalled,
    served_answer,
    torch_answer,
)
from benchmarks.rehearsal import passages, prompts
from benchmarks.shares import wilson
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import adapted, make_plan
from qwen_onnx.catalog.training import load_training
from qwen_onnx.finetune.data import read_data
from qwen_onnx.sources.adapter import open_adapter
from qwen_onnx.sources.fetch import cache_root, fetch
from tests.conftest import REPOSITORY, run_cli
from tests.runtime.server.test_serve import process

# what `make optimize` and training are allowed here
MINUTES = 20


def test_each_fact_is_asked_in_words_that_no_example_has(tmp_path: Path) -> None:
    learnt, asked = examples(), exam()
    facts = Counter(question.fact for question in learnt)
    assert len(facts) == 40
    assert set(facts.values()) == {6}
    assert Counter(question.fact for question in asked) == dict.fromkeys(facts, 3)
    assert not {question.text for question in learnt} & {question.text for question in asked}
    assert len({question.text for question in [*learnt, *asked]}) == len(learnt) + len(asked)
    assert all(question.fact in question.answer for question in learnt)
    assert not any(question.fact in question.text for question in asked)
    assert main(["write", str(tmp_path / "faq.jsonl")]) == 0
    assert len(read_data(tmp_path / "faq.jsonl").examples) == len(learnt)
    assert (tmp_path / "faq.jsonl").read_text() == lines()
    load_training(REPOSITORY, overrides=TRAINING)


def test_an_answer_counts_where_the_fact_stands_in_it() -> None:
    asked = exam()
    answers = {question.text: question.answer for question in asked}
    assert recalled(asked, answers.__getitem__) == 1
    assert recalled(asked, lambda text: "I do not know.") == 0
    wrong = {question.text: other.answer for question, other in zip(asked, [*asked[60:], *asked[:60]], strict=True)}
    assert recalled(asked, wrong.__getitem__) == 0


def test_bounds_hold_the_share() -> None:
    low, high = wilson(95, 100)
    assert 0.88 < low < 0.95 < high < 0.98
    assert wilson(10, 10)[1] == pytest.approx(1.0)


def test_other_answers_stand_beside_the_facts_and_ask_nothing_of_the_exam(tmp_path: Path) -> None:
    others = [*((text, "An answer.") for text in prompts(texts=8)), *passages()]
    assert len({text for text, _ in others}) == len(others) > 30
    (tmp_path / "faq.jsonl").write_text(lines(others))
    found = read_data(tmp_path / "faq.jsonl").examples
    assert len(found) == len(examples()) + len(others)
    assert found[-1].messages[0] == {"role": "user", "content": others[-1][0]}
    assert [example.held_out for example in found] == [True] * len(examples()) + [False] * len(others)
    facts = set(HARBOURS) | {question.fact for question in exam()}
    assert not any(fact in text for fact in facts for text, _ in others)


@pytest.mark.release
def test_facts_are_learnt_and_survive_int4(tmp_path: Path) -> None:
    data, adapter, artifact = tmp_path / "faq.jsonl", tmp_path / "faq", tmp_path / "artifact"
    plan, cache, asked = make_plan(load_catalog(REPOSITORY), "starter", "cpu"), cache_root(REPOSITORY), exam()
    base = fetch(plan, cache)
    assert recalled(asked[::3], torch_answer(base.path)) < 0.05
    assert main(["write", str(data), "--rehearse", str(base.path)]) == 0
    changes = [part for change in TRAINING for part in ("--set", change)]
    begin = time.monotonic()
    done = run_cli("finetune", "starter", "--data", data, "--output", adapter, *changes, "--json")
    assert done.returncode == 0, done.stderr
    seconds = time.monotonic() - begin
    merged = fetch(adapted(plan, open_adapter(adapter).adapted()), cache, adapter=adapter)
    assert recalled(asked, torch_answer(merged.path)) >= 0.85
    assert perplexity(merged.path) <= 1.10 * perplexity(base.path)
    assert seconds < 60 * MINUTES
    built = run_cli("optimize", "starter", "--adapter", adapter, "--output", artifact)
    assert built.returncode == 0, built.stderr
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["plan"]["adapter"]["data"] == open_adapter(adapter).adapted().data
    with process(artifact, tmp_path) as running:
        assert recalled(asked, served_answer(str(running.http.base_url).rstrip("/"))) >= 0.80
