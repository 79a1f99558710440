"""It learns: 40 invented facts, asked in words that were not trained, in PyTorch and in the INT4 artifact."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.faq import (
    HARBOURS,
    SYSTEM,
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
from benchmarks.retained import OWN, retained
from benchmarks.shares import wilson
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import adapted, make_plan
from qwen_onnx.catalog.training import load_training
from qwen_onnx.finetune.data import read_data
from qwen_onnx.sources.adapter import open_adapter
from qwen_onnx.sources.fetch import cache_root, fetch
from qwen_onnx.verify import corpus
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


def test_texts_to_retain_tell_no_fact_and_are_not_those_that_verification_reads(tmp_path: Path) -> None:
    others = list(retained(SYSTEM))
    assert main(["write", str(tmp_path / "faq.jsonl"), "--retain"]) == 0
    found = read_data(tmp_path / "faq.jsonl")
    assert len(found.examples) == len(examples())
    # the same texts each time
    assert [line.said for line in found.retained if isinstance(line.said, str)] == [
        said for said in others if isinstance(said, str)
    ]
    assert len(found.retained) == len(others) > 100
    talks = [said for said in others if not isinstance(said, str)]
    assert {talk[0]["role"] for talk in talks} == {"system", "user"}
    texts = [said if isinstance(said, str) else "\n".join(turn["content"] for turn in said) for said in others]
    facts = set(HARBOURS) | {question.fact for question in exam()}
    assert not any(fact in text for fact in facts for text in texts)
    read = set[str]().union(
        *(_stretches(document.text) for documents in corpus.domains(None).values() for document in documents)
    )
    shared = {text: _stretches(text) & read for text in texts}
    # a licence, an idiom of code or a phrase of documentation is in many files
    assert not {text: found for text, found in shared.items() if len(found) > 0.1 * len(_stretches(text))}
    assert not _stretches(OWN.read_text()) & read


def _stretches(text: str, words: int = 8) -> set[str]:
    """Every run of so many words."""
    said = text.lower().split()
    return {" ".join(said[begin : begin + words]) for begin in range(len(said) - words + 1)}


@pytest.mark.release
def test_facts_are_learnt_and_survive_int4(tmp_path: Path) -> None:
    data, adapter, artifact = tmp_path / "faq.jsonl", tmp_path / "faq", tmp_path / "artifact"
    plan, cache, asked = make_plan(load_catalog(REPOSITORY), "starter", "cpu"), cache_root(REPOSITORY), exam()
    base = fetch(plan, cache)
    assert recalled(asked[::3], torch_answer(base.path)) < 0.05
    assert main(["write", str(data), "--retain"]) == 0
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
